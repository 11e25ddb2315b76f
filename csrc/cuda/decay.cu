// Dynamic weight decay (CSNet Eq. 3 and 4): how strongly a channel answers decides how fast its γ decays.
//
//   s = f · mean_b |means[b]|
//   coupled:    gradient += λ s γ, then the optimizer;     decoupled:   γ -= λ s γ, then the optimizer
//
// adam_decay goes on with Adam's step for the same γ in the same pass. One launch serves all γ of a network: the
// layers' pointers travel in the kernel's parameters. A block has 32 channels of one layer, its warps share the
// samples. A whole CSNet reads some 2,000 γ times the batch, 200 KB at batch 24: the launch itself is the time, and
// the aim.
#include <cmath>

#include "cuda/numbers.h"

namespace sodfast::cuda {
namespace {

constexpr int threads = 256, warps = threads / 32, most_layers = 256;

struct Arguments {
  DecayLayer layers[most_layers];
  int first_block[most_layers + 1];
  int count;
  double lambda;
  bool absolute;
  double rate, root, eps, new1, old2, new2;  // of Adam
  bool decoupled;
};
static_assert(sizeof(Arguments) < 32 * 1024, "kernel parameters take 32 KB at most");

template <class T, bool adam>
__global__ void __launch_bounds__(threads) decay_layers(const __grid_constant__ Arguments a) {
  using A = typename Sum<T>::type;
  __shared__ double shared[warps][32];
  const int block = static_cast<int>(blockIdx.x);
  int low = 0, high = a.count - 1;  // the last layer whose first block is not after this one
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (a.first_block[middle] <= block)
      low = middle;
    else
      high = middle - 1;
  }
  const DecayLayer& layer = a.layers[low];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t c = static_cast<int64_t>(block - a.first_block[low]) * 32 + lane;
  double total = 0;
  if (c < layer.channels) {
    const T* means = static_cast<const T*>(layer.means) + c;
    for (int64_t b = warp; b < layer.samples; b += warps) {
      const double mean = widen(means[b * layer.channels]);
      total += a.absolute && mean < 0 ? -mean : mean;
    }
  }
  shared[warp][lane] = total;
  __syncthreads();
  if (warp > 0 || c >= layer.channels) return;
  total = 0;
  for (int w = 0; w < warps; ++w) total += shared[w][lane];
  const double factor = layer.factors != nullptr ? widen(static_cast<const T*>(layer.factors)[c]) : 1.0;
  const A strength = A(a.lambda * factor * (total / static_cast<double>(layer.samples)));  // no samples: NaN, as 0/0
  T& weight = static_cast<T*>(layer.weight)[c];
  const A old = widen(weight), decayed = strength * old;
  if (!adam) {
    if (layer.grad == nullptr) {
      narrow(old - decayed, weight);
    } else {
      T& grad = static_cast<T*>(layer.grad)[c];
      narrow(widen(grad) + decayed, grad);
    }
    return;
  }
  T &mean = static_cast<T*>(layer.exp_avg)[c], &square = static_cast<T*>(layer.exp_avg_sq)[c];
  const A given = widen(static_cast<const T*>(layer.grad)[c]);
  const A w = a.decoupled ? old - decayed : old, g = a.decoupled ? given : given + decayed;
  const A m = widen(mean) + A(a.new1) * (g - widen(mean)), v = A(a.old2) * widen(square) + A(a.new2) * g * g;
  narrow(m, mean), narrow(v, square);
  narrow(w - A(a.rate) * (m / (sqrt(v) / A(a.root) + A(a.eps))), weight);
}

template <class T, bool adam>
cudaError_t run(const DecayLayer* layers, int64_t number, Arguments& a, cudaStream_t stream) {
  for (int64_t first = 0; first < number; first += most_layers) {
    a.count = static_cast<int>(least<int64_t>(most_layers, number - first));
    for (int i = 0; i < a.count; ++i) {
      a.layers[i] = layers[first + i];
      const int64_t next = a.first_block[i] + divide_up<int64_t>(a.layers[i].channels, 32);
      if (next > INT32_MAX) return cudaErrorInvalidConfiguration;
      a.first_block[i + 1] = static_cast<int>(next);
    }
    const cudaError_t error = launch(decay_layers<T, adam>, a.first_block[a.count], threads, stream, a);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t decay(Type type, const DecayLayer* layers, int64_t number, double lambda, bool absolute,
                  cudaStream_t stream) {
  Arguments a{};
  a.lambda = lambda, a.absolute = absolute;
  return for_type(type, [&](auto zero) { return run<decltype(zero), false>(layers, number, a, stream); });
}

cudaError_t adam_decay(Type type, const DecayLayer* layers, int64_t number, double lambda, bool absolute,
                       bool decoupled, const AdamStep& adam, cudaStream_t stream) {
  Arguments a{};
  const double step = static_cast<double>(adam.step);
  a.lambda = lambda, a.absolute = absolute, a.decoupled = decoupled;
  a.rate = adam.lr / (1 - std::pow(adam.beta1, step)), a.root = std::sqrt(1 - std::pow(adam.beta2, step));
  a.eps = adam.eps, a.new1 = 1 - adam.beta1, a.old2 = adam.beta2, a.new2 = 1 - adam.beta2;
  return for_type(type, [&](auto zero) { return run<decltype(zero), true>(layers, number, a, stream); });
}

}  // namespace sodfast::cuda
