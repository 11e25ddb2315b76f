// The fused ILBlock against its three layers, which have their own tests: in float64 both agree to the last digits. And
// its first layer as it trains, with the moments of its result; and all of it in half precision.
#include "check.h"
#include "cuda/half.h"

namespace sodfast::test {
namespace {

void expect_done(cudaError_t error) {
  if (error != cudaSuccess) fail("a launch was refused", error, 0);
}

// Sizes of several tiles, too: a tile is 14 x 28 pixels and 16 channels.
GOctConvShape random_shape() {
  GOctConvShape shape;
  const int in_scales = static_cast<int>(pick(1, max_scales)), out_scales = static_cast<int>(pick(1, max_scales));
  const int64_t divisor = int64_t(1) << ((in_scales > out_scales ? in_scales : out_scales) - 1);
  shape.kernel = pick(0, 1) ? 3 : 1, shape.stride = pick(1, 2);
  shape.in = random_pyramid(in_scales, divisor * shape.stride, 11);
  shape.out = random_pyramid(out_scales, divisor, 20);
  shape.out.batch = shape.in.batch;
  shape.out.height = shape.in.height / shape.stride, shape.out.width = shape.in.width / shape.stride;
  return shape;
}

size_t workspace_values(const GOctConvShape& shape) {
  return static_cast<size_t>(cuda::goctconv_measured_workspace(shape)) / sizeof(double);
}

const auto in = [](auto& maps) { return reinterpret_cast<cuda::Pointers>(maps.read()); };
const auto out = [](auto& maps) { return reinterpret_cast<cuda::MutablePointers>(maps.write()); };

// Tensor cores against float64 on the same, rounded inputs. What a source is read as is rounded once more, and the
// result, so that an error is a few times `unit`.
template <class T>
void compare_in_half(const std::string& name, cuda::Type type, const GOctConvShape& shape, double unit) {
  const int64_t n = shape.out.total(), per_out = shape.in.total() * shape.kernel * shape.kernel;
  const auto rounded = [](const std::vector<Values>& values) { return Maps<Half<T>>(values).values(); };
  const std::vector<Values> x = rounded(random_maps(shape.in)), g = rounded(random_maps(shape.out)),
                            w = rounded({random_values(n * per_out)});
  Maps<Half<T>> xs(x), gys(g), weight(w), ys(shape.out, NAN), gxs(shape.in, NAN), gw({Values(w[0].size(), NAN)});
  Maps<double> exact_xs(x), exact_gys(g), exact_weight(w), exact_ys(shape.out, NAN), exact_gxs(shape.in, NAN),
      exact_gw({Values(w[0].size(), NAN)});
  const auto run = [&](cuda::Type as, auto& xs, auto& gys, auto& weight, auto& ys, auto& gxs, auto& gw) {
    expect_done(cuda::goctconv(as, shape, in(xs), weight[0], nullptr, nullptr, out(ys), nullptr));
    expect_done(cuda::goctconv_grad_input(as, shape, in(gys), in(xs), weight[0], out(gxs), nullptr));
    Maps<double> workspace(
        {Values(static_cast<size_t>(cuda::goctconv_grad_weight_workspace(as, shape)) / sizeof(double) + 1, NAN)});
    expect_done(cuda::goctconv_grad_weight(as, shape, in(gys), in(xs), gw[0], workspace[0], nullptr));
  };
  run(type, xs, gys, weight, ys, gxs, gw);
  run(cuda::Type::f64, exact_xs, exact_gys, exact_weight, exact_ys, exact_gxs, exact_gw);
  expect_equal(name, ys.values(), exact_ys.values(), 4 * unit);
  expect_equal(name + " gradient to the input", gxs.values(), exact_gxs.values(), 4 * unit);
  expect_equal(name + " gradient to the weight", gw.values(), exact_gw.values(), 4 * unit);

  Maps<Half<T>> measured(shape.out, NAN);
  Maps<double> moments({Values(static_cast<size_t>(2 * shape.out.batch * n), NAN)}),
      tiles({Values(workspace_values(shape), NAN)});
  expect_done(cuda::goctconv_measured(type, shape, in(xs), weight[0], out(measured), moments[0], tiles[0], nullptr));
  expect_equal(name + " measured", measured.values(), ys.values(), 0);
  expect_equal(name + " moments", moments.values(), {moments_of(shape.out, exact_ys.values())}, 16 * unit);

  if (shape.kernel == 1 && shape.stride == 2) return;
  const std::vector<Values> taps = rounded({random_values(9 * n), random_values(9 * n)}),
                            numbers = rounded({random_values(n), random_values(n), random_values(n)});
  const auto block = [&](cuda::Type as, auto& xs, auto& weight, auto& ys, auto& taps, auto& numbers) {
    const void* const weights[3] = {weight[0], taps[0], taps[1]};
    expect_done(cuda::ilblock(as, shape, in(xs), weights, in(numbers), in(numbers), out(ys), nullptr));
  };
  Maps<Half<T>> in_taps(taps), in_numbers(numbers);
  Maps<double> exact_taps(taps), exact_numbers(numbers);
  block(type, xs, weight, ys, in_taps, in_numbers);
  block(cuda::Type::f64, exact_xs, exact_weight, exact_ys, exact_taps, exact_numbers);
  expect_equal(name + " block", ys.values(), exact_ys.values(), 8 * unit);
}

}  // namespace

void test_ilblock(int cases) {
  using T = double;
  for_each_case("ilblock", cases, [](const std::string& name) {
    const GOctConvShape shape = random_shape();
    const int64_t n = shape.out.total(), per_out = shape.in.total() * shape.kernel * shape.kernel;
    Maps<T> xs(random_maps(shape.in)),
        weights({random_values(n * per_out), random_values(9 * n), random_values(9 * n)});
    Maps<T> biases({random_values(n), random_values(n), random_values(n)});
    Maps<T> slopes({random_values(n), random_values(n), random_values(n)});
    Maps<T> first(shape.out, NAN), second(shape.out, NAN), expected(shape.out, NAN), found(shape.out, NAN);
    const DepthwiseShape depthwise{shape.out, 1};
    const auto type = cuda::Type::f64;
    expect_done(cuda::goctconv(type, shape, in(xs), weights[0], biases[0], slopes[0], out(first), nullptr));
    expect_done(
        cuda::depthwise(type, depthwise, in(first), weights[1], biases[1], slopes[1], false, out(second), nullptr));
    expect_done(
        cuda::depthwise(type, depthwise, in(second), weights[2], biases[2], slopes[2], false, out(expected), nullptr));
    const cudaError_t done =
        cuda::ilblock(type, shape, in(xs), in(weights), in(biases), in(slopes), out(found), nullptr);
    if (shape.kernel == 1 && shape.stride == 2) {
      if (done == cudaSuccess || cuda::ilblock_is_one_launch(shape)) fail(name + " was not refused", done, 0);
    } else {
      expect_done(done);
      expect_equal(name, found.values(), expected.values(), 1e-13);
    }

    Maps<T> plain(shape.out, NAN), measured(shape.out, NAN), tiles({Values(workspace_values(shape), NAN)});
    Maps<T> moments({Values(static_cast<size_t>(2 * shape.out.batch * n), NAN)});
    expect_done(cuda::goctconv(type, shape, in(xs), weights[0], nullptr, nullptr, out(plain), nullptr));
    expect_done(cuda::goctconv_measured(type, shape, in(xs), weights[0], out(measured), moments[0], tiles[0], nullptr));
    expect_equal(name + " measured", measured.values(), plain.values(), 0);
    expect_equal(name + " moments", moments.values(), {moments_of(shape.out, plain.values())}, 1e-11);

    compare_in_half<__half>(name + " float16", cuda::Type::f16, shape, 1.0 / 2048);
    compare_in_half<__nv_bfloat16>(name + " bfloat16", cuda::Type::bf16, shape, 1.0 / 256);
  });
}

}  // namespace sodfast::test
