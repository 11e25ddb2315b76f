// torch.ops.sodfast.decay_ and adam_decay_ on the CPU.
#include "bind/common.h"

namespace sodfast {
namespace {

// One entry per weight, or none at all where that is allowed; every entry checked against its weight's channels.
void check_list(const char* op, const char* name, const Tensors& list, const Tensors& weights, bool in_place) {
  check(list.size() == weights.size(), op, name, " must hold ", weights.size(), " tensors, got ", list.size());
  for (size_t i = 0; i < list.size(); ++i) {
    check_vector(op, name, list[i], weights[i].size(0), weights[0]);
    check(!in_place || list[i].is_contiguous(), op, name, "[", i, "] must be contiguous");
  }
}

// What both ops take; keeps contiguous copies alive while the kernel reads them.
struct Layers {
  const Tensors &weights, &grads;
  Tensors means, factors, read_grads;

  Layers(const char* op, const Tensors& weights, const Tensors& grads, const Tensors& means_given,
         const Tensors& factors_given, bool grads_in_place)
      : weights(weights),
        grads(grads) {
    for (size_t i = 0; i < weights.size(); ++i)
      check(weights[i].dim() == 1, op, "weights[", i, "] must have one dimension, got ", shape_of(weights[i]));
    const ScalarType type = weights[0].scalar_type();
    check(type == ScalarType::Float || type == ScalarType::Double, op, "weights must be float32 or float64");
    check_list(op, "weights", weights, weights, true);
    if (!grads.empty()) check_list(op, "grads", grads, weights, grads_in_place);
    if (!factors_given.empty()) check_list(op, "factors", factors_given, weights, false);
    check(means_given.size() == weights.size(), op, "means must hold ", weights.size(), " tensors, got ",
          means_given.size());
    for (size_t i = 0; i < weights.size(); ++i) {
      check_like(op, "means", means_given[i], weights[0]);
      check(means_given[i].dim() == 2 && means_given[i].size(1) == weights[i].size(0), op, "means[", i,
            "] must have shape (samples, ", weights[i].size(0), "), got ", shape_of(means_given[i]));
    }
    means = contiguous_all(means_given), factors = contiguous_all(factors_given);
    if (!grads_in_place) read_grads = contiguous_all(grads);
  }

  template <class T>
  std::vector<DecayLayer<T>> get() const {
    std::vector<DecayLayer<T>> layers(weights.size());
    for (size_t i = 0; i < weights.size(); ++i) {
      layers[i].channels = weights[i].size(0), layers[i].samples = means[i].size(0);
      layers[i].means = read<T>(means[i]), layers[i].weight = write<T>(weights[i]);
      if (!factors.empty()) layers[i].factors = read<T>(factors[i]);
      if (!read_grads.empty())
        layers[i].grad = const_cast<T*>(read<T>(read_grads[i]));  // adam_decay only reads it
      else if (!grads.empty())
        layers[i].grad = write<T>(grads[i]);
    }
    return layers;
  }
};

void decay_(const Tensors& weights, const Tensors& grads, const Tensors& means, const Tensors& factors, double strength,
            bool absolute) {
  if (weights.empty()) return;
  const Layers given("decay_", weights, grads, means, factors, true);
  for_dtype(weights[0], [&](auto zero) {
    using T = decltype(zero);
    const std::vector<DecayLayer<T>> layers = given.get<T>();
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
  const Layers given(op, weights, grads, means, factors, false);
  check_list(op, "exp_avgs", exp_avgs, weights, true);
  check_list(op, "exp_avg_sqs", exp_avg_sqs, weights, true);
  for_dtype(weights[0], [&](auto zero) {
    using T = decltype(zero);
    std::vector<DecayLayer<T>> layers = given.get<T>();
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
