// Dynamic weight decay (CSNet Eq. 3 and 4): how strongly a channel answers decides how fast its γ decays.
//
//   s = f · mean_b |means[b]|
//   coupled:    gradient += λ s γ, then the optimizer;     decoupled:   γ -= λ s γ, then the optimizer
//
// adam_decay goes on with Adam's step for the same γ in the same pass. Per γ: reads `samples` means, reads and writes
// one number (decay) or three (Adam). A whole CSNet has some 2,000 γ, about 20 µs of work at batch 24: no threads.
#include <cmath>

#include "cpu/table.h"

namespace sodfast {
namespace SODFAST_ISA {
namespace {

constexpr int64_t block = 64;  // channels at a time: the sums stay in registers and L1

// decay[c] = λ f mean_b |means[b][c]| for `count` channels from `first` on; no samples: NaN, as 0/0.
template <class T>
void strengths(const DecayLayer<T>& layer, int64_t first, int64_t count, double lambda, bool absolute, T* decay) {
  double total[block] = {};
  for (int64_t b = 0; b < layer.samples; ++b) {
    const T* means = layer.means + b * layer.channels + first;
    if (absolute) {
      for (int64_t c = 0; c < count; ++c) total[c] += std::abs(static_cast<double>(means[c]));
    } else {
      for (int64_t c = 0; c < count; ++c) total[c] += static_cast<double>(means[c]);
    }
  }
  const double samples = static_cast<double>(layer.samples);
  for (int64_t c = 0; c < count; ++c) {
    const double factor = layer.factors != nullptr ? static_cast<double>(layer.factors[first + c]) : 1;
    decay[c] = static_cast<T>(lambda * factor * (total[c] / samples));
  }
}

// Calls f(layer, first, count, decay) for blocks of channels; decay[c] belongs to channel first + c.
template <class T, class F>
void for_each_block(const DecayLayer<T>* layers, int64_t number, double lambda, bool absolute, const F& f) {
  T decay[block];
  for (int64_t i = 0; i < number; ++i) {
    for (int64_t first = 0; first < layers[i].channels; first += block) {
      const int64_t rest = layers[i].channels - first, count = rest < block ? rest : block;
      strengths(layers[i], first, count, lambda, absolute, decay);
      f(layers[i], first, count, decay);
    }
  }
}

template <class T>
void decay(const DecayLayer<T>* layers, int64_t number, double lambda, bool absolute) {
  for_each_block(layers, number, lambda, absolute,
                 [](const DecayLayer<T>& layer, int64_t first, int64_t count, const T* d) {
                   T* weight = layer.weight + first;
                   if (layer.grad == nullptr) {
                     for (int64_t c = 0; c < count; ++c) weight[c] -= d[c] * weight[c];
                   } else {
                     T* grad = layer.grad + first;
                     for (int64_t c = 0; c < count; ++c) grad[c] += d[c] * weight[c];
                   }
                 });
}

template <class T>
void adam_decay(const DecayLayer<T>* layers, int64_t number, double lambda, bool absolute, bool decoupled,
                const AdamStep& adam) {
  const double correction1 = 1 - std::pow(adam.beta1, static_cast<double>(adam.step)),
               correction2 = 1 - std::pow(adam.beta2, static_cast<double>(adam.step));
  const T rate = static_cast<T>(adam.lr / correction1), root = static_cast<T>(std::sqrt(correction2)),
          eps = static_cast<T>(adam.eps), new1 = static_cast<T>(1 - adam.beta1), old2 = static_cast<T>(adam.beta2),
          new2 = static_cast<T>(1 - adam.beta2);
  for_each_block(layers, number, lambda, absolute,
                 [&](const DecayLayer<T>& layer, int64_t first, int64_t count, const T* d) {
                   T *weight = layer.weight + first, *mean = layer.exp_avg + first, *square = layer.exp_avg_sq + first;
                   const T* grad = layer.grad + first;
                   for (int64_t c = 0; c < count; ++c) {
                     const T decayed = d[c] * weight[c];
                     const T w = decoupled ? weight[c] - decayed : weight[c];
                     const T g = decoupled ? grad[c] : grad[c] + decayed;
                     const T m = mean[c] + new1 * (g - mean[c]), v = old2 * square[c] + new2 * g * g;
                     mean[c] = m, square[c] = v;
                     weight[c] = w - rate * (m / (std::sqrt(v) / root + eps));
                   }
                 });
}

}  // namespace

template <class T>
void add_decay(Kernels<T>& table) {
  table.decay = decay<T>;
  table.adam_decay = adam_decay<T>;
}
SODFAST_INSTANTIATE(add_decay)

}  // namespace SODFAST_ISA
}  // namespace sodfast
