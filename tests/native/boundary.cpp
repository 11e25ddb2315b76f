// The boundary of soft maps and the sums of the structure polishing loss, against their definitions in double
// precision: windows searched one by one, the first maximum in reading order.
#include "check.h"

namespace sodfast::test {
namespace {

struct Plane {
  int64_t rows, cols;
  Values v;
  double& at(int64_t y, int64_t x) { return v[static_cast<size_t>(y * cols + x)]; }
  double at(int64_t y, int64_t x) const { return v[static_cast<size_t>(y * cols + x)]; }
};

// Where the first maximum (sign 1) or minimum (sign -1) of the window around (y, x) is.
int64_t first_extreme(const Plane& p, int64_t k, double sign, int64_t y, int64_t x) {
  int64_t best = -1;
  for (int64_t r = y - k / 2; r <= y + k / 2; ++r)
    for (int64_t c = x - k / 2; c <= x + k / 2; ++c) {
      if (r < 0 || r >= p.rows || c < 0 || c >= p.cols) continue;
      const int64_t i = r * p.cols + c;
      if (best < 0 || sign * p.at(r, c) > sign * p.v[static_cast<size_t>(best)]) best = i;
    }
  return best;
}

Plane thin_boundary(const BoundaryShape& s, const Plane& z) {
  Plane t = z;
  for (int64_t y = 0; y < s.rows; ++y)
    for (int64_t x = 0; x < s.cols; ++x) {
      const double low = z.v[static_cast<size_t>(first_extreme(z, 3, -1, y, x))];
      const double high = z.v[static_cast<size_t>(first_extreme(z, 3, 1, y, x))];
      t.at(y, x) = s.thin == 1 ? z.at(y, x) - low : s.thin == 2 ? high - z.at(y, x) : high - low;
    }
  return t;
}

Plane literal(const BoundaryShape& s, const Plane& z) {
  const Plane t = thin_boundary(s, z);
  Plane b = t;
  for (int64_t y = 0; y < s.rows; ++y)
    for (int64_t x = 0; x < s.cols; ++x) b.at(y, x) = t.v[static_cast<size_t>(first_extreme(t, s.k, 1, y, x))];
  return b;
}

Plane literal_backward(const BoundaryShape& s, const Plane& g, const Plane& z) {
  const Plane t = thin_boundary(s, z);
  Plane gt{s.rows, s.cols, Values(z.v.size())}, gz = gt;
  for (int64_t y = 0; y < s.rows; ++y)
    for (int64_t x = 0; x < s.cols; ++x) gt.v[static_cast<size_t>(first_extreme(t, s.k, 1, y, x))] += g.at(y, x);
  for (int64_t y = 0; y < s.rows; ++y)
    for (int64_t x = 0; x < s.cols; ++x) {
      if (s.thin & thin_erosion) gz.v[static_cast<size_t>(first_extreme(z, 3, -1, y, x))] -= gt.at(y, x);
      if (s.thin & thin_dilation) gz.v[static_cast<size_t>(first_extreme(z, 3, 1, y, x))] += gt.at(y, x);
      if (s.thin == thin_erosion) gz.at(y, x) += gt.at(y, x);
      if (s.thin == thin_dilation) gz.at(y, x) -= gt.at(y, x);
    }
  return gz;
}

BoundaryShape random_shape() {
  BoundaryShape s;
  s.planes = pick(0, 9) == 0 ? 0 : pick(1, 3);
  s.rows = pick(0, 3) == 0 ? pick(1, 40) : pick(1, 9);
  s.cols = pick(0, 3) == 0 ? pick(1, 67) : pick(1, 18);
  s.k = pick(0, 2) == 0 ? 2 * pick(0, 15) + 1 : 2 * pick(0, 3) + 1;
  s.thin = static_cast<int>(pick(1, 3));
  return s;
}

// One of a few values each, so that there are ties, and differences that float32 has exactly.
Values from_palette(const BoundaryShape& s, const Values& palette) {
  Values v(static_cast<size_t>(s.planes * s.rows * s.cols));
  for (double& x : v) x = palette[static_cast<size_t>(pick(0, static_cast<int64_t>(palette.size()) - 1))];
  return v;
}

Plane plane_of(const BoundaryShape& s, const Values& v, int64_t plane) {
  const auto begin = v.begin() + plane * s.rows * s.cols;
  return {s.rows, s.cols, Values(begin, begin + s.rows * s.cols)};
}

Values joined(const std::vector<Plane>& planes) {
  Values all;
  for (const Plane& p : planes) all.insert(all.end(), p.v.begin(), p.v.end());
  return all;
}

template <class T>
void check_boundary(const std::string& name, const BoundaryShape& s, const Values& z, const Values& g, const Values& b,
                    const Values& gz) {
  Maps<T> in({z, g}), out({Values(z.size(), NAN), Values(z.size(), NAN)});
  kernels<T>().boundary(s, in[0], out[0], backwards());
  kernels<T>().boundary_backward(s, in[1], in[0], out[1], backwards());
  expect_equal(name, out.values(), {b, gz}, 0);
}

template <class T>
void check_sums(const std::string& name, const BoundaryShape& s, const std::vector<Values>& arguments,
                const std::vector<Values>& expected, double tolerance) {
  Maps<T> in(arguments), out({Values(expected[0].size(), NAN), Values(expected[1].size(), NAN)});
  kernels<T>().structure_polishing_sums(s, in[0], in[1], out[0], backwards());
  kernels<T>().structure_polishing_sums_backward(s, in[2], in[0], in[1], out[1], backwards());
  expect_equal(name, out.values(), expected, tolerance);
}

}  // namespace

void test_boundary(int cases) {
  for_each_case("boundary", cases, [](const std::string& name) {
    const BoundaryShape s = random_shape();
    Values palette;
    for (int64_t i = pick(1, 40); i >= 0; --i) palette.push_back(static_cast<double>(pick(-64, 64)) / 64);
    const Values z = from_palette(s, palette), g = from_palette(s, {-3, -1, 0, 1, 2, 5});
    std::vector<Plane> b, gz;
    for (int64_t i = 0; i < s.planes; ++i) {
      b.push_back(literal(s, plane_of(s, z, i)));
      gz.push_back(literal_backward(s, plane_of(s, g, i), plane_of(s, z, i)));
    }
    check_boundary<double>(name + " double", s, z, g, joined(b), joined(gz));
    check_boundary<float>(name + " float", s, z, g, joined(b), joined(gz));
  });
}

void test_structure_polishing(int cases) {
  for_each_case("structure_polishing_sums", cases, [](const std::string& name) {
    BoundaryShape s = random_shape();
    s.thin = thin_erosion;
    // No two pairs have nearly the same difference of sigmoids: float and double see the same maxima.
    const std::vector<Values> arguments = {from_palette(s, {-40, -3.125, -1.75, -0.625, 0.375, 1.25, 2.9375}),
                                           from_palette(s, {0, 0, 0.25, 0.5, 1, 1}), random_values(6 * s.planes)};
    Values sums;
    std::vector<Plane> gradients;
    for (int64_t i = 0; i < s.planes; ++i) {
      Plane p = plane_of(s, arguments[0], i);
      for (double& x : p.v) x = 1 / (1 + std::exp(-x));
      const Plane g = plane_of(s, arguments[1], i), bp = literal(s, p), bg = literal(s, g);
      const double* w = arguments[2].data() + 6 * i;
      Plane of_edge = bg;
      for (double& x : of_edge.v) x = w[3] * x + w[4];
      Plane gradient = literal_backward(s, of_edge, p);
      for (size_t j = 0; j < p.v.size(); ++j)
        gradient.v[j] = (gradient.v[j] + w[0] * g.v[j] + w[1]) * p.v[j] * (1 - p.v[j]);
      gradients.push_back(gradient);
      for (const auto& [a, b] : {std::pair(p, g), std::pair(bp, bg)}) {
        double ab = 0, sum_a = 0, sum_b = 0;
        for (size_t j = 0; j < a.v.size(); ++j) ab += a.v[j] * b.v[j], sum_a += a.v[j], sum_b += b.v[j];
        sums.insert(sums.end(), {ab, sum_a, sum_b});
      }
    }
    const std::vector<Values> expected = {sums, joined(gradients)};
    check_sums<double>(name + " double", s, arguments, expected, 1e-12);
    check_sums<float>(name + " float", s, arguments, expected, 3e-5);
  });
}

}  // namespace sodfast::test
