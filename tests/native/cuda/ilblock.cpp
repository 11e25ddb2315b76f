// The fused ILBlock against its three layers, which have their own tests: in float64 both agree to the last digits. And
// its first layer as it trains, with the moments of its result.
#include "check.h"
#include "cuda/kernels.h"

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
    const auto in = [](Maps<T>& maps) { return reinterpret_cast<cuda::Pointers>(maps.read()); };
    const auto out = [](Maps<T>& maps) { return reinterpret_cast<cuda::MutablePointers>(maps.write()); };
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
  });
}

}  // namespace sodfast::test
