// torch.ops.sodfast.decay_ and adam_decay_ on CUDA.
#include "bind/cuda.h"
#include "bind/decay.h"

namespace sodfast {
namespace {

std::vector<cuda::DecayLayer> pointers(const DecayArguments& given) {
  std::vector<cuda::DecayLayer> layers(given.weights.size());
  for (size_t i = 0; i < layers.size(); ++i) {
    layers[i].channels = given.weights[i].size(0), layers[i].samples = given.means[i].size(0);
    layers[i].means = given.means[i].const_data_ptr(), layers[i].weight = given.weights[i].mutable_data_ptr();
    if (!given.factors.empty()) layers[i].factors = given.factors[i].const_data_ptr();
    if (!given.read_grads.empty())
      layers[i].grad = const_cast<void*>(given.read_grads[i].const_data_ptr());  // adam_decay only reads it
    else if (!given.grads.empty())
      layers[i].grad = given.grads[i].mutable_data_ptr();
  }
  return layers;
}

void decay_(const Tensors& weights, const Tensors& grads, const Tensors& means, const Tensors& factors, double strength,
            bool absolute) {
  if (weights.empty()) return;
  const char* op = "decay_";
  const DecayArguments given(op, weights, grads, means, factors, true);
  const std::vector<cuda::DecayLayer> layers = pointers(given);
  on_device(op, weights[0], [&](cudaStream_t stream) {
    return cuda::decay(type_of(weights[0]), layers.data(), static_cast<int64_t>(layers.size()), strength, absolute,
                       stream);
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
  std::vector<cuda::DecayLayer> layers = pointers(given);
  for (size_t i = 0; i < layers.size(); ++i) {
    layers[i].exp_avg = exp_avgs[i].mutable_data_ptr(), layers[i].exp_avg_sq = exp_avg_sqs[i].mutable_data_ptr();
  }
  on_device(op, weights[0], [&](cudaStream_t stream) {
    return cuda::adam_decay(type_of(weights[0]), layers.data(), static_cast<int64_t>(layers.size()), strength, absolute,
                            decoupled, {lr, beta1, beta2, eps, step}, stream);
  });
}

}  // namespace

SODFAST_CUDA_LIBRARY(m) {
  m.impl("decay_", TORCH_BOX(&decay_));
  m.impl("adam_decay_", TORCH_BOX(&adam_decay_));
}

}  // namespace sodfast
