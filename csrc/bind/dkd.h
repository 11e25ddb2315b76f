// The arguments of dynamic distillation's loss, checked; the same for every device.
#pragma once

#include <cmath>

#include "bind/common.h"

namespace sodfast {

inline DkdShape shape_of_map(const char* op, const char* name, const Tensor& x) {
  check(on_known_device(x), op, name, " must be on ", known_device);
  check(is_known(x.scalar_type()), op, name, " must be ", known_dtypes);
  check(x.dim() == 4 && x.size(1) == 1, op, name, " must have shape (B, 1, H, W), got ", shape_of(x));
  check(x.size(2) > 0 && x.size(3) > 0, op, name, " has an empty size: ", shape_of(x));
  return {x.size(0), x.size(2) * x.size(3)};
}

// The three maps, checked; keeps contiguous copies alive while the kernel reads them.
struct DkdMaps {
  DkdShape shape;
  Tensor student, teacher, truth;
  DkdMaps(const char* op, const Tensor& s, const Tensor& t, const Tensor& g)
      : shape(shape_of_map(op, "student_logits", s)) {
    check_same_shape(op, "teacher_logits", t, s);
    check_same_shape(op, "truth", g, s);
    student = torch::stable::contiguous(s), teacher = torch::stable::contiguous(t),
    truth = torch::stable::contiguous(g);
  }
};

inline DkdRule dkd_rule(const char* op, double p, double threshold, double epsilon) {
  check(p >= 0 && p <= 1, op, "p must be in 0–1");
  check(threshold <= 1, op, "threshold must be at most 1");
  check(epsilon >= 0 && epsilon <= 1, op, "epsilon must be in 0–1");
  return {p, threshold, epsilon};
}

inline void check_dkd_numbers(const char* op, double temperature, double kl_factor) {
  check(temperature > 0 && std::isfinite(temperature), op, "temperature must be above 0 and finite");
  check(kl_factor >= 0 && std::isfinite(kl_factor), op, "kl_factor must be finite and from 0 on");
}

}  // namespace sodfast
