// The depthwise and dilated kernels against one literal dense convolution in double precision. Both are linear in
// input and weight, so with any gradient g:   <g, y> = <gw, w> = <gx, x>,   and as bilinear forms in any direction.
#include "check.h"

namespace sodfast::test {
namespace {

// y[o] += Σ_c w[o][c] *_d x[c] for one sample; y and x are planes of rows × cols.
void literal(const double* x, const double* w, double* y, int64_t outs, int64_t channels, int64_t rows, int64_t cols,
             int64_t dilation) {
  for (int64_t o = 0; o < outs; ++o)
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t q = 0; q < cols; ++q)
          for (int64_t t = 0; t < 9; ++t) {
            const int64_t yy = r + (t / 3 - 1) * dilation, xx = q + (t % 3 - 1) * dilation;
            if (yy < 0 || yy >= rows || xx < 0 || xx >= cols) continue;
            y[(o * rows + r) * cols + q] += x[(c * rows + yy) * cols + xx] * w[(o * channels + c) * 9 + t];
          }
}

std::vector<Values> zeros(const Pyramid& p) {
  std::vector<Values> out;
  for (int s = 0; s < p.scales; ++s) out.emplace_back(static_cast<size_t>(p.batch * p.channels[s] * p.area(s)), 0.0);
  return out;
}

// ------------------------------------------------------------------------------------------------ depthwise
std::vector<Values> literal(const DepthwiseShape& shape, const std::vector<Values>& xs, const Values& w) {
  const Pyramid& p = shape.maps;
  std::vector<Values> ys = zeros(p);
  for (int s = 0; s < p.scales; ++s)
    for (int64_t i = 0; i < p.batch * p.channels[s]; ++i)
      literal(xs[s].data() + i * p.area(s), w.data() + 9 * (p.begin(s) + i % p.channels[s]),
              ys[s].data() + i * p.area(s), 1, 1, p.rows(s), p.cols(s), shape.dilation);
  return ys;
}

template <class T>
std::vector<Values> run(const DepthwiseShape& shape, const std::vector<Values>& xs, const Values& weight, bool flip) {
  Maps<T> in(xs), w({weight}), out(shape.maps, NAN);
  kernels<T>().depthwise(shape, in.read(), w[0], nullptr, nullptr, flip, out.write(), backwards());
  return out.values();
}
template <class T>
std::vector<Values> grad_weight(const DepthwiseShape& shape, const std::vector<Values>& gys,
                                const std::vector<Values>& xs) {
  Maps<T> g(gys), in(xs), out({Values(static_cast<size_t>(9 * shape.maps.total()), NAN)});
  kernels<T>().depthwise_grad_weight(shape, g.read(), in.read(), out[0], backwards());
  return out.values();
}

// -------------------------------------------------------------------------------------------------- dilated
std::vector<Values> literal(const DilatedShape& shape, const std::vector<Values>& xs, const std::vector<Values>& ws) {
  std::vector<Values> ys = zeros(shape.out);
  for (int s = 0; s < shape.in.scales; ++s)
    for (int64_t b = 0; b < shape.in.batch; ++b) {
      int64_t o = 0;
      for (int d = 0; d < shape.dilations; o += shape.branch[s][d], ++d)
        literal(xs[s].data() + b * shape.in.channels[s] * shape.in.area(s), ws[s].data() + o * shape.in.channels[s] * 9,
                ys[s].data() + (b * shape.out.channels[s] + o) * shape.out.area(s), shape.branch[s][d],
                shape.in.channels[s], shape.in.rows(s), shape.in.cols(s), shape.dilation[d]);
    }
  return ys;
}

template <class T>
struct Dilated {
  const DilatedShape& shape;
  std::vector<Values> forward(const std::vector<Values>& xs, const std::vector<Values>& ws) const {
    Maps<T> in(xs), w(ws), out(shape.out, NAN);
    kernels<T>().dilated(shape, in.read(), w.read(), nullptr, nullptr, out.write(), backwards());
    return out.values();
  }
  std::vector<Values> grad_input(const std::vector<Values>& gys, const std::vector<Values>& ws) const {
    Maps<T> g(gys), w(ws), out(shape.in, NAN);
    kernels<T>().dilated_grad_input(shape, g.read(), w.read(), out.write(), backwards());
    return out.values();
  }
  std::vector<Values> grad_weight(const std::vector<Values>& gys, const std::vector<Values>& xs,
                                  const std::vector<Values>& ws) const {
    Maps<T> g(gys), in(xs), out(ws);
    kernels<T>().dilated_grad_weight(shape, g.read(), in.read(), out.write(), backwards());
    return out.values();
  }
};

}  // namespace

void test_depthwise(int cases) {
  for_each_case("depthwise", cases, [](const std::string& name) {
    DepthwiseShape shape;
    const int scales = static_cast<int>(pick(1, max_scales));
    shape.maps = random_pyramid(scales, 1 << (scales - 1), 9);
    shape.dilation = pick(0, 9) == 0 ? 1000000 : pick(1, 5);
    const std::vector<Values> xs = random_maps(shape.maps), gys = random_maps(shape.maps);
    const Values w = random_values(9 * shape.maps.total());
    const std::vector<Values> y = literal(shape, xs, w);
    expect_equal(name + " forward double", run<double>(shape, xs, w, false), y, 1e-13);
    expect_equal(name + " forward float", run<float>(shape, xs, w, false), y, 3e-6);
    const std::vector<Values> gx = run<double>(shape, gys, w, true), gw = grad_weight<double>(shape, gys, xs);
    expect_near(name + " <gx, x>", dot(gx, xs), dot(gys, y), 1e-10);
    const std::vector<Values> v = random_maps(shape.maps);
    const Values u = random_values(9 * shape.maps.total());
    expect_near(name + " <gx, v>", dot(gx, v), dot(gys, literal(shape, v, w)), 1e-10);
    expect_near(name + " <gw, u>", dot(gw, {u}), dot(gys, literal(shape, xs, u)), 1e-10);
    expect_equal(name + " grad_input float", run<float>(shape, gys, w, true), gx, 3e-6);
    expect_equal(name + " grad_weight float", grad_weight<float>(shape, gys, xs), gw, 3e-6);
  });
}

void test_dilated(int cases) {
  for_each_case("dilated", cases, [](const std::string& name) {
    DilatedShape shape;
    const int scales = static_cast<int>(pick(1, 3));
    shape.in = random_pyramid(scales, 1 << (scales - 1), 9);
    shape.out = shape.in;
    shape.dilations = static_cast<int>(pick(1, 5));
    for (int d = 0; d < shape.dilations; ++d) shape.dilation[d] = pick(0, 9) == 0 ? 1000000 : int64_t(1) << pick(0, 4);
    std::vector<Values> ws, us;
    for (int s = 0; s < scales; ++s) {
      shape.out.channels[s] = 0;
      for (int d = 0; d < shape.dilations; ++d) shape.out.channels[s] += shape.branch[s][d] = pick(0, 4);
      ws.push_back(random_values(shape.out.channels[s] * shape.in.channels[s] * 9));
      us.push_back(random_values(shape.out.channels[s] * shape.in.channels[s] * 9));
    }
    const std::vector<Values> xs = random_maps(shape.in), gys = random_maps(shape.out), v = random_maps(shape.in);
    const std::vector<Values> y = literal(shape, xs, ws);
    const Dilated<double> exact{shape};
    const Dilated<float> fast{shape};
    expect_equal(name + " forward double", exact.forward(xs, ws), y, 1e-13);
    expect_equal(name + " forward float", fast.forward(xs, ws), y, 3e-6);
    const std::vector<Values> gx = exact.grad_input(gys, ws), gw = exact.grad_weight(gys, xs, ws);
    expect_near(name + " <gx, v>", dot(gx, v), dot(gys, literal(shape, v, ws)), 1e-10);
    expect_near(name + " <gw, u>", dot(gw, us), dot(gys, literal(shape, xs, us)), 1e-10);
    expect_equal(name + " grad_input float", fast.grad_input(gys, ws), gx, 3e-6);
    expect_equal(name + " grad_weight float", fast.grad_weight(gys, xs, ws), gw, 3e-6);
  });
}

}  // namespace sodfast::test
