// The sums behind the weight of dynamic distillation, and its loss with the gradient.
//
// With e = exp(-|x|), sigmoid(|x|) = 1 / (1 + e) and 1 - sigmoid(|x|) = e / (1 + e): exact in both tails. With
// x⁺ = max(x, 0), x⁻ = max(-x, 0) and l(x) = log(1 + exp(-|x|)) the losses of a pixel are, for z, t the logits over T,
//
//   KL = (1 - p)(z⁺ - t⁺) + p (z⁻ - t⁻) + l(z) - l(t)           CE = (1 - g) x⁺ + g x⁻ + l(x)
//
// and no number there is larger than the logits. The sum of the l's of a block of pixels is one logarithm of a product.
// Per pixel: sums 2 exponentials and divisions, loss 3 of each, against three reads (and the gradient's write).
#include "common/scratch.h"
#include "common/sigmoid.h"
#include "cpu/table.h"

namespace sodfast {
namespace SODFAST_ISA {
namespace {

// Pixels are taken in blocks; their sums, in float64, are added up in order, whoever made them.
template <class T>
constexpr int64_t block = 64 * Vec<T>::lanes;

// Calls f(image, first pixel, count, number of the block) for the blocks of each task.
template <class T, class F>
void for_each_block(const DkdShape& shape, int64_t work_per_pixel, const Parallel& parallel, const F& f) {
  const int64_t per_image = (shape.pixels + block<T> - 1) / block<T>;
  parallel(shape.images * per_image, grain_for(work_per_pixel * block<T>), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % per_image * block<T>;
      f(i / per_image, first, least(block<T>, shape.pixels - first), i);
    }
  });
}

// The `numbers` sums of each image from those of its blocks.
template <class T>
void add_blocks(const DkdShape& shape, int numbers, const double* blocks, double* totals) {
  const int64_t per_image = (shape.pixels + block<T> - 1) / block<T>;
  for (int64_t i = 0; i < shape.images * per_image; ++i)
    for (int k = 0; k < numbers; ++k) {
      double& total = totals[i / per_image * numbers + k];
      total = (i % per_image ? total : 0) + blocks[i * numbers + k];
    }
}

// sigmoid(x) and what belongs to it.
template <class T>
struct Logistic {
  Vec<T> e, p, not_p, above, below;  // exp(-|x|), sigmoid(x), 1 - sigmoid(x), x⁺, x⁻
  explicit Logistic(Vec<T> x) {
    const Vec<T> zero(T(0)), one(T(1)), minus = zero - x;
    e = exp(where_greater(x, zero, minus, x));
    const Vec<T> large = one / (one + e), small = e * large;
    p = where_greater(x, zero, large, small), not_p = where_greater(x, zero, small, large);
    above = where_greater(x, zero, x, zero), below = where_greater(x, zero, zero, minus);
  }
};

template <class T>
Vec<T> first_of(Vec<T> a, int64_t count) {
  return count == Vec<T>::lanes ? a : keep(a, count);
}

// Σ log(1 + e) over one block as the logarithm of the product, which is kept less 1: a small e is not lost.
template <class T>
struct LogSum {
  Vec<T> product{T(0)};
  void add(Vec<T> e) { product = fma(product, e, product + e); }  // e ≤ 1: a lane stays below 2^64
  double value() const {
    T lane[Vec<T>::lanes];
    product.store(lane);
    double all = 0, logs = 0;
    for (const T x : lane) {
      all += x + all * x;
      if (all > 1e200) logs += std::log1p(all), all = 0;
    }
    return logs + std::log1p(all);
  }
};

template <class T>
void dkd_sums(const DkdShape& shape, const T* student, const T* teacher, const T* truth, T* sums,
              const Parallel& parallel) {
  Heap<double> blocks(4 * shape.images * (shape.pixels / block<T> + 1)), totals(4 * shape.images);
  for_each_block<T>(shape, 24, parallel, [&](int64_t image, int64_t first, int64_t count, int64_t number) {
    const int64_t start = image * shape.pixels + first;
    const T* const maps[2] = {student + start, teacher + start};
    const Vec<T> one(T(1));
    Vec<T> together[2] = {T(0), T(0)}, apart[2] = {T(0), T(0)};
    for_each_vector<T>(count, [&](int64_t x, int64_t n) {
      const Vec<T> g = load(truth + start + x, n), not_g = one - g;
      for (int i = 0; i < 2; ++i) {
        const Logistic<T> s(load(maps[i] + x, n));
        together[i] = fma(s.p, g, together[i]);
        apart[i] = apart[i] + first_of(fma(s.p, not_g, s.not_p * g), n);
      }
    });
    double* to = blocks.data() + 4 * number;
    for (int i = 0; i < 2; ++i) {
      to[2 * i] = static_cast<double>(sum(together[i]));
      to[2 * i + 1] = static_cast<double>(sum(apart[i]));
    }
  });
  add_blocks<T>(shape, 4, blocks.data(), totals.data());
  for (int64_t i = 0; i < 4 * shape.images; ++i) sums[i] = static_cast<T>(totals.data()[i]);
}

template <class T>
void dkd_loss(const DkdShape& shape, const T* student, const T* teacher, const T* truth, const T* theta,
              double temperature, double kl_factor, T* loss, T* gradient, const Parallel& parallel) {
  const double pixels = static_cast<double>(shape.pixels);
  Heap<double> blocks(2 * shape.images * (shape.pixels / block<T> + 1)), totals(2 * shape.images);
  for_each_block<T>(shape, 40, parallel, [&](int64_t image, int64_t first, int64_t count, int64_t number) {
    const int64_t start = image * shape.pixels + first;
    const double weight = static_cast<double>(theta[image]);
    const Vec<T> one(T(1)), zero(T(0)), per_t(static_cast<T>(1 / temperature)),
        kl_weight(static_cast<T>(weight * kl_factor / temperature / pixels)),
        ce_weight(static_cast<T>((1 - weight) / pixels));
    LogSum<T> of_student, of_teacher, of_map;
    Vec<T> kl(zero), ce(zero);
    for_each_vector<T>(count, [&](int64_t x, int64_t n) {
      const Vec<T> logit = load(student + start + x, n), g = load(truth + start + x, n);
      const Logistic<T> map(logit), q(logit * per_t), p(load(teacher + start + x, n) * per_t);
      of_student.add(first_of(q.e, n)), of_teacher.add(first_of(p.e, n)), of_map.add(first_of(map.e, n));
      kl = kl + fma(p.not_p, q.above - p.above, p.p * (q.below - p.below));
      ce = ce + fma(one - g, map.above, g * map.below);
      if (gradient != nullptr) store(fma(kl_weight, q.p - p.p, ce_weight * (map.p - g)), gradient + start + x, n);
    });
    double* to = blocks.data() + 2 * number;
    to[0] = static_cast<double>(sum(kl)) + of_student.value() - of_teacher.value();
    to[1] = static_cast<double>(sum(ce)) + of_map.value();
  });
  add_blocks<T>(shape, 2, blocks.data(), totals.data());
  for (int64_t i = 0; i < shape.images; ++i) {
    const double weight = static_cast<double>(theta[i]), *total = totals.data() + 2 * i;
    loss[i] = static_cast<T>((weight * kl_factor * total[0] + (1 - weight) * total[1]) / pixels);
  }
}

template <class T>
void dkd_loss_backward(const DkdShape& shape, const T* g, const T* gradient, T* gstudent, const Parallel& parallel) {
  for_each_block<T>(shape, 1, parallel, [&](int64_t image, int64_t first, int64_t count, int64_t) {
    const int64_t start = image * shape.pixels + first;
    const Vec<T> factor(g[image]);
    for_each_vector<T>(
        count, [&](int64_t x, int64_t n) { store(factor * load(gradient + start + x, n), gstudent + start + x, n); });
  });
}

}  // namespace

template <class T>
void add_dkd(Kernels<T>& table) {
  table.dkd_sums = dkd_sums<T>;
  table.dkd_loss = dkd_loss<T>;
  table.dkd_loss_backward = dkd_loss_backward<T>;
}
SODFAST_INSTANTIATE(add_dkd)

}  // namespace SODFAST_ISA
}  // namespace sodfast
