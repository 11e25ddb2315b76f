// SCFM's fusion against its definition in double precision, and its gradients as the transpose of that.
#include <algorithm>

#include "check.h"

namespace sodfast::test {
namespace {

struct Between {
  int64_t lower, upper;
  double weight;
};

Between between(int64_t d, int64_t n, int64_t from) {
  const double source =
      std::fmax(0, (static_cast<double>(d) + 0.5) * static_cast<double>(from) / static_cast<double>(n) - 0.5);
  const int64_t lower = std::min(static_cast<int64_t>(source), from - 1);
  return {lower, std::min(lower + 1, from - 1), source - static_cast<double>(lower)};
}

// Calls f(index in x, index in y, weight) for the four terms of every upsampled value.
template <class F>
void for_each_term(const ScfmShape& s, const F& f) {
  for (int64_t p = 0; p < s.maps; ++p)
    for (int64_t r = 0; r < s.rows; ++r)
      for (int64_t c = 0; c < s.cols; ++c)
        for (int64_t channel = 0; channel < s.channels; ++channel) {
          const Between v = between(r, s.rows, s.from_rows), h = between(c, s.cols, s.from_cols);
          const auto at = [&](int64_t y, int64_t x) {
            return static_cast<size_t>(((p * s.from_rows + y) * s.from_cols + x) * s.channels + channel);
          };
          const size_t to = static_cast<size_t>(((p * s.rows + r) * s.cols + c) * s.channels + channel);
          f(to, at(v.lower, h.lower), (1 - v.weight) * (1 - h.weight));
          f(to, at(v.lower, h.upper), (1 - v.weight) * h.weight);
          f(to, at(v.upper, h.lower), v.weight * (1 - h.weight));
          f(to, at(v.upper, h.upper), v.weight * h.weight);
        }
}

template <class T>
void run(const std::string& name, const ScfmShape& s, const std::vector<Values>& arguments,
         const std::vector<Values>& expected, double tolerance) {
  Maps<T> in(arguments), out({Values(expected[0].size(), NAN)}), gradients({expected[1], expected[2]});
  kernels<T>().scfm(s, in[0], in[1], out[0], backwards());
  expect_equal(name + " forward", out.values(), {expected[0]}, tolerance);
  for (size_t i = 0; i < expected[1].size(); ++i) gradients[0][i] = static_cast<T>(NAN);
  for (size_t i = 0; i < expected[2].size(); ++i) gradients[1][i] = static_cast<T>(NAN);
  kernels<T>().scfm_backward(s, in[2], in[0], in[1], s.multiply ? gradients[0] : nullptr, gradients[1], backwards());
  std::vector<Values> found = gradients.values();
  if (!s.multiply) found[0] = expected[1];  // nobody wrote it
  expect_equal(name + " backward", found, {expected[1], expected[2]}, tolerance);
}

}  // namespace

void test_scfm(int cases) {
  for_each_case("scfm", cases, [](const std::string& name) {
    ScfmShape s;
    s.maps = pick(0, 9) == 0 ? 0 : pick(1, 3);
    if (pick(0, 1)) s.channels = pick(0, 2) == 0 ? pick(15, 40) : pick(1, 9);
    s.from_rows = pick(1, 12), s.from_cols = pick(0, 2) == 0 ? pick(1, 40) : pick(1, 12);
    if (pick(0, 1)) {
      const int64_t ratio = pick(0, 2) == 0 ? pick(1, 8) : 2;
      s.rows = ratio * s.from_rows, s.cols = ratio * s.from_cols;
    } else {
      s.rows = pick(1, 20), s.cols = pick(0, 2) == 0 ? pick(1, 67) : pick(1, 20);
    }
    s.multiply = pick(0, 1) == 1;
    const int64_t values = s.maps * s.channels;
    const int64_t large = values * s.rows * s.cols, small = values * s.from_rows * s.from_cols;
    const Values x = random_values(large), y = random_values(small), g = random_values(large);

    Values up(x.size()), out(x.size()), gx(x.size()), gy(y.size());
    for_each_term(s, [&](size_t to, size_t from, double weight) { up[to] += weight * y[from]; });
    for (size_t i = 0; i < x.size(); ++i) {
      out[i] = x[i] + (s.multiply ? x[i] * up[i] : up[i]);
      gx[i] = s.multiply ? g[i] * (1 + up[i]) : g[i];
    }
    for_each_term(
        s, [&](size_t to, size_t from, double weight) { gy[from] += weight * g[to] * (s.multiply ? x[to] : 1); });
    run<double>(name + " double", s, {x, y, g}, {out, gx, gy}, 1e-12);
    run<float>(name + " float", s, {x, y, g}, {out, gx, gy}, 1e-5);
  });
}

}  // namespace sodfast::test
