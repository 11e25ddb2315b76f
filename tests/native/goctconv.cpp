// goctconv against a literal double-precision transcription of its definition; the gradients by what they must
// satisfy. The operator is linear in the weight and piecewise linear in the input, so with any gradient g
//   <g, y> = <gw, w> = <gx, x>   and   <g, f(x + e·v) - f(x)> / e = <gx, v>   for small e.
#include "check.h"

namespace sodfast::test {
namespace {

struct Map {  // one sample's scale
  int64_t c = 0, h = 0, w = 0;
  Values v;
  Map(int64_t channels, int64_t height, int64_t width)
      : c(channels),
        h(height),
        w(width),
        v(static_cast<size_t>(channels * height * width)) {}
  double& at(int64_t k, int64_t y, int64_t x) { return v[static_cast<size_t>((k * h + y) * w + x)]; }
};

Map pool(Map m, int64_t f, bool average) {
  Map out(m.c, m.h / f, m.w / f);
  for (int64_t k = 0; k < out.c; ++k)
    for (int64_t y = 0; y < out.h; ++y)
      for (int64_t x = 0; x < out.w; ++x) {
        double best = average ? 0 : -INFINITY;
        for (int64_t i = 0; i < f * f; ++i) {
          const double value = m.at(k, y * f + i / f, x * f + i % f);
          best = average ? best + value / static_cast<double>(f * f) : std::fmax(best, value);
        }
        out.at(k, y, x) = best;
      }
  return out;
}

Map upsample(Map m, int64_t f) {
  Map out(m.c, m.h * f, m.w * f);
  const auto source = [f](int64_t i, int64_t n, int64_t& a, int64_t& b) {
    const double s = std::fmax((static_cast<double>(i) + 0.5) / static_cast<double>(f) - 0.5, 0.0);
    a = static_cast<int64_t>(s), b = a + 1 < n ? a + 1 : n - 1;
    return s - static_cast<double>(a);
  };
  for (int64_t k = 0; k < out.c; ++k)
    for (int64_t y = 0; y < out.h; ++y)
      for (int64_t x = 0; x < out.w; ++x) {
        int64_t y0, y1, x0, x1;
        const double u = source(y, m.h, y0, y1), t = source(x, m.w, x0, x1);
        out.at(k, y, x) = (1 - u) * ((1 - t) * m.at(k, y0, x0) + t * m.at(k, y0, x1)) +
                          u * ((1 - t) * m.at(k, y1, x0) + t * m.at(k, y1, x1));
      }
  return out;
}

std::vector<Values> literal(const GOctConvShape& shape, const std::vector<Values>& xs, const Values& weight) {
  const Pyramid &in = shape.in, &out = shape.out;
  std::vector<Values> ys;
  for (int j = 0; j < out.scales; ++j)
    ys.emplace_back(static_cast<size_t>(out.batch * out.channels[j] * out.area(j)), 0.0);
  const int64_t k = shape.kernel, k2 = k * k;
  for (int64_t b = 0; b < in.batch; ++b)
    for (int i = 0; i < in.scales; ++i) {
      Map x(in.channels[i], in.rows(i), in.cols(i));
      for (size_t n = 0; n < x.v.size(); ++n) x.v[n] = xs[i][static_cast<size_t>(b) * x.v.size() + n];
      if (shape.stride == 2) x = pool(x, 2, true);
      for (int j = 0; j < out.scales; ++j) {
        Map source = j > i ? pool(x, int64_t(1) << (j - i), false) : x;
        Map y(out.channels[j], source.h, source.w);
        for (int64_t o = 0; o < y.c; ++o)
          for (int64_t c = 0; c < source.c; ++c)
            for (int64_t r = 0; r < y.h; ++r)
              for (int64_t q = 0; q < y.w; ++q)
                for (int64_t t = 0; t < k2; ++t) {
                  const int64_t yy = r + t / k - k / 2, xx = q + t % k - k / 2;
                  if (yy < 0 || yy >= y.h || xx < 0 || xx >= y.w) continue;
                  y.at(o, r, q) +=
                      source.at(c, yy, xx) *
                      weight[static_cast<size_t>(((out.begin(j) + o) * in.total() + in.begin(i) + c) * k2 + t)];
                }
        if (j < i) y = upsample(y, int64_t(1) << (i - j));
        for (size_t n = 0; n < y.v.size(); ++n) ys[j][static_cast<size_t>(b) * y.v.size() + n] += y.v[n];
      }
    }
  return ys;
}

struct Case {
  GOctConvShape shape;
  std::vector<Values> xs, gys;
  Values weight, bias, slope;
  Case() {
    const int n_in = static_cast<int>(pick(1, max_scales)), n_out = static_cast<int>(pick(1, max_scales));
    shape.stride = pick(1, 2), shape.kernel = pick(0, 1) ? 3 : 1;
    const int unit = 1 << ((n_in > n_out ? n_in : n_out) - 1);
    shape.in = random_pyramid(n_in, unit * static_cast<int>(shape.stride), unit > 4 ? 4 : 12);
    if (unit == 1 && shape.stride == 2) shape.in.height += pick(0, 1), shape.in.width += pick(0, 1);  // odd: floor
    shape.out = shape.in;
    shape.out.scales = n_out, shape.out.height /= shape.stride, shape.out.width /= shape.stride;
    for (int s = 0; s < max_scales; ++s) shape.out.channels[s] = s < n_out && pick(0, 4) ? pick(1, 13) : 0;
    xs = random_maps(shape.in), gys = random_maps(shape.out);
    weight = random_values(shape.out.total() * shape.in.total() * shape.kernel * shape.kernel);
    bias = random_values(shape.out.total()), slope = random_values(shape.out.total());
  }
};

template <class T>
std::vector<Values> forward(const Case& c, const std::vector<Values>& xs, bool epilogue) {
  Maps<T> in(xs), w({c.weight, c.bias, c.slope}), out(c.shape.out, NAN);
  kernels<T>().goctconv(c.shape, in.read(), w[0], epilogue ? w[1] : nullptr, epilogue ? w[2] : nullptr, out.write(),
                        backwards());
  return out.values();
}
template <class T>
std::vector<Values> grad_input(const Case& c) {
  Maps<T> g(c.gys), in(c.xs), w({c.weight}), out(c.shape.in, NAN);
  kernels<T>().goctconv_grad_input(c.shape, g.read(), in.read(), w[0], out.write(), backwards());
  return out.values();
}
template <class T>
std::vector<Values> grad_weight(const Case& c) {
  Maps<T> g(c.gys), in(c.xs), out({Values(c.weight.size(), NAN)});
  kernels<T>().goctconv_grad_weight(c.shape, g.read(), in.read(), out[0], backwards());
  return out.values();
}

}  // namespace

void test_goctconv(int cases) {
  for_each_case("goctconv", cases, [](const std::string& name) {
    const Case c;
    const std::vector<Values> expected = literal(c.shape, c.xs, c.weight);
    std::vector<Values> activated = expected;
    for (int s = 0; s < c.shape.out.scales; ++s)
      for (size_t i = 0; i < activated[s].size(); ++i) {
        const size_t o = static_cast<size_t>(c.shape.out.begin(s)) +
                         i / static_cast<size_t>(c.shape.out.area(s)) % static_cast<size_t>(c.shape.out.channels[s]);
        const double z = activated[s][i] + c.bias[o];
        activated[s][i] = z > 0 ? z : z * c.slope[o];
      }
    expect_equal(name + " forward double", forward<double>(c, c.xs, false), expected, 1e-13);
    expect_equal(name + " epilogue double", forward<double>(c, c.xs, true), activated, 1e-13);
    expect_equal(name + " forward float", forward<float>(c, c.xs, false), expected, 3e-6);
    expect_equal(name + " epilogue float", forward<float>(c, c.xs, true), activated, 3e-6);

    const std::vector<Values> gx = grad_input<double>(c), gw = grad_weight<double>(c);
    const double gy = dot(c.gys, expected);
    expect_near(name + " <gw, w>", dot(gw, {c.weight}), gy, 1e-10);
    expect_near(name + " <gx, x>", dot(gx, c.xs), gy, 1e-10);
    const std::vector<Values> v = random_maps(c.shape.in);
    std::vector<Values> moved = c.xs;
    constexpr double step = 1e-7;
    for (size_t s = 0; s < v.size(); ++s)
      for (size_t i = 0; i < v[s].size(); ++i) moved[s][i] += step * v[s][i];
    expect_near(name + " <gx, v>", (dot(c.gys, literal(c.shape, moved, c.weight)) - gy) / step, dot(gx, v), 1e-4);
    expect_equal(name + " grad_input float", grad_input<float>(c), gx, 3e-6);
    expect_equal(name + " grad_weight float", grad_weight<float>(c), gw, 3e-6);
  });
}

}  // namespace sodfast::test
