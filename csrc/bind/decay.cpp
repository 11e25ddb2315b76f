// torch.ops.sodfast.decay_ and adam_decay_ on the CPU.
#include "bind/cpu.h"
#include "bind/decay.h"

namespace sodfast {
namespace {

template <class T>
std::vector<DecayLayer<T>> pointers(const DecayArguments& given) {
  const Tensors &weights = given.weights, &grads = given.grads;
  std::vector<DecayLayer<T>> layers(weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    layers[i].channels = weights[i].size(0), layers[i].samples = given.means[i].size(0);
    layers[i].means = read<T>(given.means[i]), layers[i].weight = write<T>(weights[i]);
    if (!given.factors.empty()) layers[i].factors = read<T>(given.factors[i]);
    if (!given.read_grads.empty())
      layers[i].grad = const_cast<T*>(read<T>(given.read_grads[i]));  // adam_decay only reads it
    else if (!grads.empty())
      layers[i].grad = write<T>(grads[i]);
  }
  return layers;
}

void decay_(const Tensors& weights, const Tensors& grads, const Tensors& means, const Tensors& factors, double strength,
            bool absolute) {
  if (weights.empty()) return;
  const DecayArguments given("decay_", weights, grads, means, factors, true);
  for_dtype(weights[0], [&](auto zero) {
    using T = decltype(zero);
    const std::vector<DecayLayer<T>> layers = pointers<T>(given);
    kernels<T>().decay(layers.data(), static_cast<int64_t>(layers.size()), strength, absolute);
  });
}

void adam_decay_(const Tensors& weights, const Tensors& grads, const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
                 const Tensors& means, const Tensors& factors, double strength, bool absolute, bool decoupled,
                 double lr, double beta1, double beta2, double eps, int64_t step) {
  const char* op = "adam_decay_";
  check(step >= 1, op, "step must be at least 1, got ", step);
  if (weights.empty()) return;
  check(grads.size() == weights.size(), op, "grads must hold ", weights.size(), " tensors, got ", grads.size());
  const DecayArguments given(op, weights, grads, means, factors, false);
  check_list(op, "exp_avgs", exp_avgs, weights, true);
  check_list(op, "exp_avg_sqs", exp_avg_sqs, weights, true);
  for_dtype(weights[0], [&](auto zero) {
    using T = decltype(zero);
    std::vector<DecayLayer<T>> layers = pointers<T>(given);
    for (size_t i = 0; i < layers.size(); ++i) {
      layers[i].exp_avg = write<T>(exp_avgs[i]), layers[i].exp_avg_sq = write<T>(exp_avg_sqs[i]);
    }
    kernels<T>().adam_decay(layers.data(), static_cast<int64_t>(layers.size()), strength, absolute, decoupled,
                            {lr, beta1, beta2, eps, step});
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sodfast, CPU, m) {
  m.impl("decay_", TORCH_BOX(&decay_));
  m.impl("adam_decay_", TORCH_BOX(&adam_decay_));
}

}  // namespace sodfast
