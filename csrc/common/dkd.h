// The weight of dynamic distillation from an image's sums; the same on every device.
#pragma once

#include <cmath>

#include "common/shapes.h"

namespace sodfast {
namespace {

// Σ p g and Σ (p (1 - g) + (1 - p) g) of a map p and the truth g: their IoU is together / (together + apart).
struct DkdOverlap {
  double together = 0, apart = 0;
};

// α, the teacher's IoU, and β, 1 - the student's; of nothing and nothing the IoU is 1. θ = tanh(α^p β^(1-p)), or ε
// where α is not above the threshold: α as it is returned, in A. NaN stays NaN.
template <class A>
struct DkdWeight {
  A theta, alpha, beta;
  SODFAST_HOST_DEVICE DkdWeight(const DkdRule& rule, const DkdOverlap& student, const DkdOverlap& teacher) {
    const double of_student = student.together + student.apart, of_teacher = teacher.together + teacher.apart;
    alpha = static_cast<A>(of_teacher == 0 ? 1 : teacher.together / of_teacher);
    beta = static_cast<A>(of_student == 0 ? 0 : student.apart / of_student);
    const double a = static_cast<double>(alpha), b = static_cast<double>(beta);
    theta = static_cast<A>(alpha <= static_cast<A>(rule.threshold) ? rule.epsilon
                                                                   : tanh(pow(a, rule.p) * pow(b, 1 - rule.p)));
  }
};

}  // namespace
}  // namespace sodfast
