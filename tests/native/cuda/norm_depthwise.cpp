// The norm with the depthwise convolution behind it against the two kernels one after the other, which have their own
// tests: values, statistics, the moments of the result, and all gradients agree in float64.
#include "check.h"
#include "cuda/kernels.h"

namespace sodfast::test {
namespace {

using T = double;

void expect_done(cudaError_t error) {
  if (error != cudaSuccess) fail("a launch was refused", error, 0);
}
cuda::Vector vector(T* p) { return {p, cuda::Type::f64}; }
cuda::Pointers in(Maps<T>& maps) { return reinterpret_cast<cuda::Pointers>(maps.read()); }
cuda::MutablePointers out(Maps<T>& maps) { return reinterpret_cast<cuda::MutablePointers>(maps.write()); }
Maps<T> empty(int64_t n) { return Maps<T>({Values(static_cast<size_t>(n), NAN)}); }

}  // namespace

void test_norm_depthwise(int cases) {
  for_each_case("norm_depthwise", cases, [](const std::string& name) {
    const int scales = static_cast<int>(pick(1, max_scales));
    Pyramid maps = random_pyramid(scales, 1 << (scales - 1), 7);
    if (maps.area(scales - 1) < 16) maps.height *= 4, maps.width *= 4;  // statistics of a few values are wild
    if (pick(0, 5) == 0) maps.channels[0] = 1, maps.height = 64, maps.width = 72;  // planes of a whole block
    const bool training = pick(0, 2) > 0, given = pick(0, 1) == 1;
    const int64_t n = maps.total(), samples = maps.batch * n;
    const double eps = 1e-5;
    const auto type = cuda::Type::f64;
    const std::vector<Values> x = random_maps(maps);
    Values var = random_values(n);
    for (double& v : var) v = 0.1 + std::abs(v);
    Maps<T> xs(x), gys(random_maps(maps)), w({random_values(9 * n)}), running({random_values(n), var});
    Maps<T> v({random_values(n), random_values(n), random_values(n)});
    const cuda::NormActParameters parameters{vector(v[0]), vector(v[1]), vector(v[2])};
    const DepthwiseShape depthwise{maps, 1};
    const auto scratch = [](int64_t bytes) { return empty((bytes + 7) / 8); };

    Maps<T> y(maps, NAN), expected(maps, NAN), statistics({Values(n, NAN), Values(n, NAN)}), means = empty(samples);
    Maps<T> work = scratch(cuda::norm_act_workspace(type, maps));
    expect_done(cuda::norm_act(type, maps, in(xs), parameters, vector(running[0]), vector(running[1]), nullptr, eps,
                               training, vector(statistics[0]), vector(statistics[1]), out(y), vector(means[0]),
                               work[0], nullptr));
    expect_done(cuda::depthwise(type, depthwise, in(y), w[0], nullptr, nullptr, false, out(expected), nullptr));

    Maps<T> found(maps, NAN), found_statistics({Values(n, NAN), Values(n, NAN)}), found_means = empty(samples);
    Maps<T> moments({moments_of(maps, x)}), found_moments = empty(2 * samples);
    if (training) {  // the norm alone, of the moments and without a workspace
      expect_done(cuda::norm_act(type, maps, in(xs), parameters, vector(running[0]), vector(running[1]), moments[0],
                                 eps, true, vector(found_statistics[0]), vector(found_statistics[1]), out(found),
                                 vector(found_means[0]), nullptr, nullptr));
      expect_equal(name + " of moments", found.values(), y.values(), 1e-11);
      expect_equal(name + " of moments, means", found_means.values(), means.values(), 1e-11);
      if (maps.batch > 0)
        expect_equal(name + " of moments, statistics", found_statistics.values(), statistics.values(), 1e-11);
    }
    Maps<T> other_work = scratch(given ? 0 : cuda::norm_depthwise_workspace(type, maps));
    expect_done(cuda::norm_depthwise(type, maps, in(xs), parameters, vector(running[0]), vector(running[1]),
                                     vector(w[0]), given ? moments[0] : nullptr, eps, training,
                                     vector(found_statistics[0]), vector(found_statistics[1]), out(found),
                                     vector(found_means[0]), found_moments[0], other_work[0], nullptr));
    expect_equal(name + " forward", found.values(), expected.values(), 1e-11);
    expect_equal(name + " channel means", found_means.values(), means.values(), 1e-11);
    if (maps.batch == 0) return;
    expect_equal(name + " statistics", found_statistics.values(), statistics.values(), 1e-11);
    expect_equal(name + " moments", found_moments.values(), {moments_of(maps, expected.values())}, 1e-11);

    Maps<T> gy(maps, NAN), gx(maps, NAN), g({Values(n, NAN), Values(n, NAN), Values(n, NAN)}), gw = empty(9 * n);
    Maps<T> sums = scratch(cuda::depthwise_grad_weight_workspace(type, depthwise)),
            back = scratch(cuda::norm_act_backward_workspace(type, maps));
    expect_done(cuda::depthwise(type, depthwise, in(gys), w[0], nullptr, nullptr, true, out(gy), nullptr));
    expect_done(cuda::depthwise_grad_weight(type, depthwise, in(gys), in(y), gw[0], sums[0], nullptr));
    expect_done(cuda::norm_act_backward(type, maps, in(gy), in(xs), parameters, vector(statistics[0]),
                                        vector(statistics[1]), eps, training, out(gx), vector(g[0]), vector(g[1]),
                                        vector(g[2]), back[0], nullptr));
    Maps<T> found_gx(maps, NAN), found_g({Values(n, NAN), Values(n, NAN), Values(n, NAN)}), found_gw = empty(9 * n);
    Maps<T> found_back = scratch(cuda::norm_depthwise_backward_workspace(type, maps));
    expect_done(cuda::norm_depthwise_backward(type, maps, in(gys), in(xs), parameters, vector(statistics[0]),
                                              vector(statistics[1]), vector(w[0]), eps, training, out(found_gx),
                                              vector(found_g[0]), vector(found_g[1]), vector(found_g[2]),
                                              vector(found_gw[0]), found_back[0], nullptr));
    expect_equal(name + " gradient to x", found_gx.values(), gx.values(), 1e-10);
    expect_equal(name + " gradients to gamma, beta, slope", found_g.values(), g.values(), 1e-10);
    expect_equal(name + " gradient to the kernel", found_gw.values(), gw.values(), 1e-10);
  });
}

}  // namespace sodfast::test
