// BatchNorm + PReLU: the forward against its definition in double precision, the backward by finite differences of
// that definition along random directions of every argument.
#include "check.h"

namespace sodfast::test {
namespace {

struct Case {
  Pyramid maps;
  bool training;
  double eps = 1e-5;
  std::vector<Values> xs, gys;
  Values gamma, beta, slope, mean, var;
  Case() {
    const int scales = static_cast<int>(pick(1, max_scales));
    maps = random_pyramid(scales, 1 << (scales - 1), 7);
    if (maps.area(scales - 1) < 16) maps.height *= 4, maps.width *= 4;  // statistics of a few values are wild
    training = pick(0, 2) > 0;
    xs = random_maps(maps), gys = random_maps(maps);
    const int64_t n = maps.total();
    gamma = random_values(n), beta = random_values(n), slope = random_values(n), mean = random_values(n);
    for (int64_t i = 0; i < n; ++i) var.push_back(0.1 + std::abs(static_cast<double>(static_cast<float>(normal()))));
  }
  size_t channel(int s, size_t i) const {
    return static_cast<size_t>(maps.begin(s)) +
           i / static_cast<size_t>(maps.area(s)) % static_cast<size_t>(maps.channels[s]);
  }
};

// Fills mean and var of a training case; returns y.
std::vector<Values> literal(Case& c) {
  const size_t n = c.gamma.size();
  if (c.training) {
    Values count(n), sum(n), square(n);
    for (int s = 0; s < c.maps.scales; ++s)
      for (size_t i = 0; i < c.xs[s].size(); ++i) count[c.channel(s, i)] += 1, sum[c.channel(s, i)] += c.xs[s][i];
    for (size_t i = 0; i < n; ++i) c.mean[i] = sum[i] / count[i];
    for (int s = 0; s < c.maps.scales; ++s)
      for (size_t i = 0; i < c.xs[s].size(); ++i)
        square[c.channel(s, i)] += std::pow(c.xs[s][i] - c.mean[c.channel(s, i)], 2);
    for (size_t i = 0; i < n; ++i) c.var[i] = square[i] / count[i];
  }
  std::vector<Values> ys = c.xs;
  for (int s = 0; s < c.maps.scales; ++s)
    for (size_t i = 0; i < ys[s].size(); ++i) {
      const size_t k = c.channel(s, i);
      const double z = (c.xs[s][i] - c.mean[k]) / std::sqrt(c.var[k] + c.eps) * c.gamma[k] + c.beta[k];
      ys[s][i] = z > 0 ? z : z * c.slope[k];
    }
  return ys;
}

template <class T>
void run(const std::string& name, const Case& c, const Case& expected, const std::vector<Values>& y, double tolerance) {
  const int64_t n = c.maps.total();
  Maps<T> in(c.xs), out(c.maps, NAN), v({c.gamma, c.beta, c.slope, c.mean, c.var});
  Maps<T> means({Values(static_cast<size_t>(c.maps.batch * n), NAN)});
  kernels<T>().norm_act(c.maps, in.read(), v[0], v[1], v[2], nullptr, static_cast<T>(c.eps), c.training, v[3], v[4],
                        out.write(), means[0], backwards());
  expect_equal(name + " forward", out.values(), y, tolerance);
  if (c.maps.batch == 0) return;
  expect_equal(name + " mean and var", {v.values()[3], v.values()[4]}, {expected.mean, expected.var}, tolerance);
  Values spatial(static_cast<size_t>(c.maps.batch * n));
  for (int s = 0; s < c.maps.scales; ++s)
    for (size_t i = 0; i < y[s].size(); ++i) {
      const size_t plane = static_cast<size_t>(c.maps.area(s)),
                   per_sample = plane * static_cast<size_t>(c.maps.channels[s]);
      spatial[i / per_sample * static_cast<size_t>(n) + c.channel(s, i)] += y[s][i] / static_cast<double>(plane);
    }
  expect_equal(name + " channel means", means.values(), {spatial}, tolerance);
}

template <class T>
std::vector<Values> backward(const Case& c) {  // gx of every scale, then of gamma, beta, slope
  Maps<T> g(c.gys), in(c.xs), out(c.maps, NAN), v({c.gamma, c.beta, c.slope, c.mean, c.var});
  const Values blank(c.gamma.size(), NAN);
  Maps<T> gp({blank, blank, blank});
  kernels<T>().norm_act_backward(c.maps, g.read(), in.read(), v[0], v[1], v[2], v[3], v[4], static_cast<T>(c.eps),
                                 c.training, out.write(), gp[0], gp[1], gp[2], backwards());
  std::vector<Values> all = out.values();
  for (const Values& p : gp.values()) all.push_back(p);
  return all;
}

}  // namespace

void test_norm_act(int cases) {
  for_each_case("norm_act", cases, [](const std::string& name) {
    const Case c;
    Case filled = c;
    const std::vector<Values> y = literal(filled);
    run<double>(name + " double", c, filled, y, 1e-11);
    run<float>(name + " float", c, filled, y, 1e-5);
    if (c.maps.batch == 0) return;
    const std::vector<Values> gradient = backward<double>(filled);

    // A step towards both sides, small enough that (almost) no z crosses zero.
    constexpr double step = 1e-8;
    Case plus = c, minus = c;
    std::vector<Values> direction;
    const auto move = [&](Values& a, Values& b) {
      direction.push_back(random_values(static_cast<int64_t>(a.size())));
      for (size_t i = 0; i < a.size(); ++i) a[i] += step * direction.back()[i], b[i] -= step * direction.back()[i];
    };
    for (int s = 0; s < c.maps.scales; ++s) move(plus.xs[s], minus.xs[s]);
    move(plus.gamma, minus.gamma), move(plus.beta, minus.beta), move(plus.slope, minus.slope);
    const double slope = (dot(c.gys, literal(plus)) - dot(c.gys, literal(minus))) / (2 * step);
    expect_near(name + " directional derivative", dot(gradient, direction), slope, 2e-4);
    expect_equal(name + " backward float", backward<float>(filled), gradient, 1e-4);
  });
}

}  // namespace sodfast::test
