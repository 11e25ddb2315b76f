// The norm with the depthwise convolution behind it against the two kernels one after the other, which have their own
// tests: values, statistics, the moments of the result, and all gradients. And the norm alone, of given moments.
#include "check.h"

namespace sodfast::test {
namespace {

struct Case {
  Pyramid maps;
  bool training, given;
  std::vector<Values> xs, gys;
  Values gamma, beta, slope, mean, var, weight, moments;
  Case() {
    const int scales = static_cast<int>(pick(1, max_scales));
    maps = random_pyramid(scales, 1 << (scales - 1), 7);
    if (maps.area(scales - 1) < 16) maps.height *= 4, maps.width *= 4;  // statistics of a few values are wild
    if (pick(0, 5) == 0) maps.channels[0] = 1, maps.height = 64, maps.width = 72;  // a GPU's block; bands of rows
    training = pick(0, 2) > 0, given = training && pick(0, 1) == 1;
    xs = random_maps(maps), gys = random_maps(maps);
    const int64_t n = maps.total();
    gamma = random_values(n), beta = random_values(n), slope = random_values(n), mean = random_values(n);
    for (double v : random_values(n)) var.push_back(0.1 + std::abs(v));
    weight = random_values(9 * n);
    moments = moments_of(maps, xs);
  }
};

struct Results {
  std::vector<Values> ys, means, statistics, moments, gxs, gparameters, gweight;
};

// By one kernel, or by two: norm, then convolution.
template <class T>
Results run(const Case& c, bool at_once) {
  const int64_t n = c.maps.total();
  const Values blank(static_cast<size_t>(n), NAN), samples(static_cast<size_t>(c.maps.batch * n), NAN);
  const T eps = static_cast<T>(1e-5);
  const DepthwiseShape convolution{c.maps, 1};
  const Kernels<T>& k = kernels<T>();
  Maps<T> in(c.xs), g(c.gys), y(c.maps, NAN), out(c.maps, NAN), gy(c.maps, NAN), gx(c.maps, NAN), means({samples});
  Maps<T> v({c.gamma, c.beta, c.slope}), statistics({c.mean, c.var}), w({c.weight});
  Maps<T> gv({blank, blank, blank}), gw({Values(c.weight.size(), NAN)});
  Maps<double> given({c.moments}), moments({Values(c.moments.size(), NAN)});
  const double* of_xs = c.given ? given[0] : nullptr;
  if (at_once) {
    k.norm_depthwise(c.maps, in.read(), v[0], v[1], v[2], w[0], of_xs, eps, c.training, statistics[0], statistics[1],
                     out.write(), means[0], moments[0], backwards());
    k.norm_depthwise_backward(c.maps, g.read(), in.read(), v[0], v[1], v[2], statistics[0], statistics[1], w[0], eps,
                              c.training, gx.write(), gv[0], gv[1], gv[2], gw[0], backwards());
  } else {
    k.norm_act(c.maps, in.read(), v[0], v[1], v[2], of_xs, eps, c.training, statistics[0], statistics[1], y.write(),
               means[0], backwards());
    k.depthwise(convolution, y.read(), w[0], nullptr, nullptr, false, out.write(), backwards());
    k.depthwise(convolution, g.read(), w[0], nullptr, nullptr, true, gy.write(), backwards());
    k.depthwise_grad_weight(convolution, g.read(), y.read(), gw[0], backwards());
    k.norm_act_backward(c.maps, gy.read(), in.read(), v[0], v[1], v[2], statistics[0], statistics[1], eps, c.training,
                        gx.write(), gv[0], gv[1], gv[2], backwards());
  }
  return {out.values(), means.values(), statistics.values(), moments.values(), gx.values(), gv.values(), gw.values()};
}

}  // namespace

void test_norm_depthwise(int cases) {
  for_each_case("norm_depthwise", cases, [](const std::string& name) {
    const Case c;
    const Results expected = run<double>(c, false), found = run<double>(c, true), narrow = run<float>(c, true);
    const auto compare = [&](const char* what, std::vector<Values> Results::* member, double narrow_tolerance) {
      expect_equal(name + what + " double", found.*member, expected.*member, 1e-10);
      expect_equal(name + what + " float", narrow.*member, expected.*member, narrow_tolerance);
    };
    compare(" forward", &Results::ys, 2e-5);
    if (c.maps.batch == 0) return;  // statistics of nothing are NaN
    compare(" channel means", &Results::means, 1e-5);
    compare(" statistics", &Results::statistics, 1e-5);
    if (c.training) {
      const std::vector<Values> exact = {moments_of(c.maps, expected.ys)};
      expect_equal(name + " moments double", found.moments, exact, 1e-11);
      expect_equal(name + " moments float", narrow.moments, exact, 1e-4);
    }
    compare(" gradient to x", &Results::gxs, 2e-4);
    compare(" gradients to gamma, beta, slope", &Results::gparameters, 2e-4);
    compare(" gradient to the kernel", &Results::gweight, 2e-4);

    if (!c.training) return;
    Case measured = c;
    measured.given = !c.given;
    const Results other = run<double>(measured, false);
    expect_equal(name + " the norm, its moments given or not", other.ys, expected.ys, 1e-10);
    expect_equal(name + " the norm's statistics", other.statistics, expected.statistics, 1e-10);
  });
}

}  // namespace sodfast::test
