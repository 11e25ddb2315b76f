// The weight of dynamic distillation, and its loss with the gradient. The formulas are those of
// csrc/cpu/dkd.cpp: with e = exp(-|x|) nothing cancels in either tail.
//
// A block takes 2048 pixels of one image and writes their sums, in float64; a second launch, a block per image, adds
// them up in a fixed order. Bytes: three maps read once for the sums and once for the loss, which writes one: 28 per
// pixel in float32 against some 100 FLOPs, five exponentials and three logarithms. Batch 4 at 256² is 1.8 MB each
// time: the four launches are the time.
#include <cmath>

#include "common/dkd.h"
#include "cuda/reduce.h"

namespace sodfast::cuda {
namespace {

constexpr int threads = 256, warps = threads / 32, tile = 8 * threads;

struct Arguments {
  DkdShape shape;
  int64_t slices;  // of an image
  const void *student, *teacher, *truth, *theta;
  DkdRule rule;
  double temperature, kl_factor;
  void *gradient, *result, *alpha, *beta;
  double* partial;  // [image][slice][numbers]
};

template <class A>
struct Logistic {
  A e, p, not_p, above, below;  // exp(-|x|), sigmoid(x), 1 - sigmoid(x), max(x, 0), max(-x, 0)
  __device__ __forceinline__ explicit Logistic(A x) {
    const bool positive = x > 0;
    e = exp(positive ? -x : x);
    const A large = 1 / (1 + e), small = e * large;
    p = positive ? large : small, not_p = positive ? small : large;
    above = positive ? x : A(0), below = positive ? A(0) : -x;
  }
};

// Calls f(pixel) for this thread's pixels of the block's slice, offsets within all images.
template <class F>
__device__ __forceinline__ void for_each_pixel(const DkdShape& shape, int64_t image, int64_t slice, const F& f) {
#pragma unroll
  for (int k = 0; k < tile / threads; ++k) {
    const int64_t i = slice * tile + k * threads + static_cast<int64_t>(threadIdx.x);
    if (i < shape.pixels) f(image * shape.pixels + i);
  }
}

template <class T>
__global__ void __launch_bounds__(threads) sum_maps(const __grid_constant__ Arguments a) {
  using A = typename Sum<T>::type;
  int64_t slice;
  const int64_t image = divide(blockIdx.x, a.slices, slice);
  A total[4] = {0, 0, 0, 0};
  for_each_pixel(a.shape, image, slice, [&](int64_t i) {
    const A g = widen(static_cast<const T*>(a.truth)[i]);
    const Logistic<A> s(widen(static_cast<const T*>(a.student)[i])), t(widen(static_cast<const T*>(a.teacher)[i]));
    total[0] += s.p * g, total[1] += s.p * (1 - g) + s.not_p * g;
    total[2] += t.p * g, total[3] += t.p * (1 - g) + t.not_p * g;
  });
  write_partial<warps>(total, a.partial);
}

template <class T>
__global__ void __launch_bounds__(threads) weigh(const __grid_constant__ Arguments a) {
  double total[4];
  add_partials<warps>(a.partial, a.slices, total);
  if (threadIdx.x > 0) return;
  const DkdWeight<typename Sum<T>::type> weight(a.rule, {total[0], total[1]}, {total[2], total[3]});
  narrow(weight.theta, static_cast<T*>(a.result)[blockIdx.x]);
  narrow(weight.alpha, static_cast<T*>(a.alpha)[blockIdx.x]);
  narrow(weight.beta, static_cast<T*>(a.beta)[blockIdx.x]);
}

template <class T>
__global__ void __launch_bounds__(threads) measure_loss(const __grid_constant__ Arguments a) {
  using A = typename Sum<T>::type;
  int64_t slice;
  const int64_t image = divide(blockIdx.x, a.slices, slice);
  const double theta = widen(static_cast<const T*>(a.theta)[image]), pixels = static_cast<double>(a.shape.pixels);
  const A per_t = A(1 / a.temperature), kl_weight = A(theta * a.kl_factor / a.temperature / pixels),
          ce_weight = A((1 - theta) / pixels);
  A total[2] = {0, 0};  // KL, CE
  for_each_pixel(a.shape, image, slice, [&](int64_t i) {
    const A x = widen(static_cast<const T*>(a.student)[i]), g = widen(static_cast<const T*>(a.truth)[i]);
    const Logistic<A> map(x), q(x * per_t), p(widen(static_cast<const T*>(a.teacher)[i]) * per_t);
    total[0] += p.not_p * (q.above - p.above) + p.p * (q.below - p.below) + (log1p(q.e) - log1p(p.e));
    total[1] += (1 - g) * map.above + g * map.below + log1p(map.e);
    if (a.gradient != nullptr)
      narrow(kl_weight * (q.p - p.p) + ce_weight * (map.p - g), static_cast<T*>(a.gradient)[i]);
  });
  write_partial<warps>(total, a.partial);
}

template <class T>
__global__ void __launch_bounds__(threads) finish_loss(const __grid_constant__ Arguments a) {
  double total[2];
  add_partials<warps>(a.partial, a.slices, total);
  if (threadIdx.x > 0) return;
  const double theta = widen(static_cast<const T*>(a.theta)[blockIdx.x]), pixels = static_cast<double>(a.shape.pixels);
  const double loss = (theta * a.kl_factor * total[0] + (1 - theta) * total[1]) / pixels;
  narrow(static_cast<typename Sum<T>::type>(loss), static_cast<T*>(a.result)[blockIdx.x]);
}

template <class T>
__global__ void __launch_bounds__(threads) scale(const __grid_constant__ Arguments a) {
  int64_t slice;
  const int64_t image = divide(blockIdx.x, a.slices, slice);
  const auto factor = widen(static_cast<const T*>(a.theta)[image]);
  for_each_pixel(a.shape, image, slice, [&](int64_t i) {
    narrow(factor * widen(static_cast<const T*>(a.gradient)[i]), static_cast<T*>(a.result)[i]);
  });
}

Arguments arguments_of(const DkdShape& shape) {
  Arguments a{};
  a.shape = shape, a.slices = divide_up<int64_t>(shape.pixels, tile);
  return a;
}

// The blocks of the first launch, then those of the second.
cudaError_t launch_both(void (*first)(Arguments), void (*second)(Arguments), const Arguments& a, cudaStream_t stream) {
  const cudaError_t error = launch(first, a.shape.images * a.slices, threads, stream, a);
  return error == cudaSuccess ? launch(second, a.shape.images, threads, stream, a) : error;
}

}  // namespace

int64_t dkd_workspace(const DkdShape& shape) {
  return 4 * static_cast<int64_t>(sizeof(double)) * shape.images * divide_up<int64_t>(shape.pixels, tile);
}

cudaError_t dkd_theta(Type type, const DkdShape& shape, const void* student, const void* teacher, const void* truth,
                      const DkdRule& rule, void* theta, void* alpha, void* beta, void* workspace, cudaStream_t stream) {
  Arguments a = arguments_of(shape);
  a.student = student, a.teacher = teacher, a.truth = truth, a.rule = rule;
  a.result = theta, a.alpha = alpha, a.beta = beta;
  a.partial = static_cast<double*>(workspace);
  return for_type(type, [&](auto zero) {
    using T = decltype(zero);
    return launch_both(sum_maps<T>, weigh<T>, a, stream);
  });
}

cudaError_t dkd_loss(Type type, const DkdShape& shape, const void* student, const void* teacher, const void* truth,
                     const void* theta, double temperature, double kl_factor, void* loss, void* gradient,
                     void* workspace, cudaStream_t stream) {
  Arguments a = arguments_of(shape);
  a.student = student, a.teacher = teacher, a.truth = truth, a.theta = theta;
  a.temperature = temperature, a.kl_factor = kl_factor, a.result = loss, a.gradient = gradient;
  a.partial = static_cast<double*>(workspace);
  return for_type(type, [&](auto zero) {
    using T = decltype(zero);
    return launch_both(measure_loss<T>, finish_loss<T>, a, stream);
  });
}

cudaError_t dkd_loss_backward(Type type, const DkdShape& shape, const void* g, const void* gradient, void* gstudent,
                              cudaStream_t stream) {
  Arguments a = arguments_of(shape);
  a.theta = g, a.gradient = const_cast<void*>(gradient), a.result = gstudent;
  return for_type(
      type, [&](auto zero) { return launch(scale<decltype(zero)>, shape.images * a.slices, threads, stream, a); });
}

}  // namespace sodfast::cuda
