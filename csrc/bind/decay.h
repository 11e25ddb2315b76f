// The arguments of dynamic weight decay, checked; the same for every device.
#pragma once

#include "bind/common.h"

namespace sodfast {

// One entry per weight, or none at all where that is allowed; every entry checked against its weight's channels.
inline void check_list(const char* op, const char* name, const Tensors& list, const Tensors& weights, bool in_place) {
  check(list.size() == weights.size(), op, name, " must hold ", weights.size(), " tensors, got ", list.size());
  for (size_t i = 0; i < list.size(); ++i) {
    check_vector(op, name, list[i], weights[i].size(0), weights[0]);
    check(!in_place || list[i].is_contiguous(), op, name, "[", i, "] must be contiguous");
  }
}

// What both ops take; keeps contiguous copies alive while the kernel reads them.
struct DecayArguments {
  const Tensors &weights, &grads;
  Tensors means, factors, read_grads;

  DecayArguments(const char* op, const Tensors& weights, const Tensors& grads, const Tensors& means_given,
                 const Tensors& factors_given, bool grads_in_place)
      : weights(weights),
        grads(grads) {
    for (size_t i = 0; i < weights.size(); ++i)
      check(weights[i].dim() == 1, op, "weights[", i, "] must have one dimension, got ", shape_of(weights[i]));
    check(is_known(weights[0].scalar_type()), op, "weights must be ", known_dtypes);
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
};

}  // namespace sodfast
