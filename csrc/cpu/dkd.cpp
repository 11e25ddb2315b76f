// The weight of dynamic distillation, and its loss with the gradient.
//
// With e = exp(-|x|), sigmoid(|x|) = 1 / (1 + e) and 1 - sigmoid(|x|) = e / (1 + e): exact in both tails. With z, t the
// logits over T and l(x) = log(1 + exp(-|x|)), turned so that the teacher says yes (a = ±z with t's sign, u = 1 -
// sigmoid(|t|), which leaves the divergence as it is), the losses of a pixel are
//
//   KL = max(-a, 0) + u (a - |t|) + l(z) - l(t)           CE = max(x, 0) - g x + l(x)
//
// and no number there is larger than the logits. The sum of the l's of a block of pixels is one logarithm of a product.
// Per pixel: sums 2 exponentials and divisions, loss 3 of each, against three reads (and the gradient's write). The
// arithmetic is the time, so each formula is the one with the fewest operations.
#include "common/dkd.h"
#include "common/scratch.h"
#include "common/sigmoid.h"
#include "cpu/table.h"

namespace sodfast {
namespace SODFAST_ISA {
namespace {

// Pixels are taken in blocks; their sums, in float64, are added up in order, whoever made them.
template <class T>
constexpr int64_t block = 120 * Vec<T>::lanes;

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

// Of |x|: exp(-|x|), sigmoid(|x|) and 1 - sigmoid(|x|).
template <class T>
struct Logistic {
  Vec<T> e, large;
  explicit Logistic(Vec<T> minus_abs) {
    const Vec<T> one(T(1));
    e = exp(minus_abs), large = one / (one + e);
  }
  Vec<T> small() const { return e * large; }
};

template <class T>
Vec<T> minus_abs(Vec<T> x) {
  return min_or_second(x, Vec<T>(T(0)) - x);
}

template <class T>
Vec<T> first_of(Vec<T> a, int64_t count) {
  return count == Vec<T>::lanes ? a : keep(a, count);
}

// Σ log(1 + e) over one block as the logarithm of the product, which is kept less 1: a small e is not lost.
template <class T>
struct LogSum {
  Vec<T> product{T(0)};
  void add(Vec<T> e) { product = fma(product, Vec<T>(T(1)) + e, e); }  // e ≤ 1: a lane stays below 2^120
  double value() const {
    constexpr int chains = Vec<T>::lanes < 4 ? 1 : 4;
    T lane[Vec<T>::lanes];
    product.store(lane);
    double part[chains] = {};  // each of at most 4 lanes: below 2^480
    for (int64_t i = 0; i < Vec<T>::lanes; i += chains)
      for (int k = 0; k < chains; ++k) part[k] += lane[i + k] + part[k] * lane[i + k];
    double logs = 0;
    for (const double x : part) logs += std::log1p(x);
    return logs;
  }
};

template <class T>
void dkd_theta(const DkdShape& shape, const T* student, const T* teacher, const T* truth, const DkdRule& rule, T* theta,
               T* alpha, T* beta, const Parallel& parallel) {
  Heap<double> blocks(4 * shape.images * (shape.pixels / block<T> + 1)), totals(4 * shape.images);
  for_each_block<T>(shape, 24, parallel, [&](int64_t image, int64_t first, int64_t count, int64_t number) {
    const int64_t start = image * shape.pixels + first;
    const T* const maps[2] = {student + start, teacher + start};
    const Vec<T> one(T(1)), zero(T(0));
    Vec<T> together[2] = {zero, zero}, apart[2] = {zero, zero};
    for_each_vector<T>(count, [&](int64_t i, int64_t n) {
      const Vec<T> g = load(truth + start + i, n), not_g = one - g;
      for (int k = 0; k < 2; ++k) {
        const Vec<T> x = load(maps[k] + i, n);
        const Logistic<T> s(minus_abs(x));
        // What the truth has of the value that the map takes for likely, and of the other.
        const Vec<T> right = where_greater(x, zero, g, not_g), wrong = where_greater(x, zero, not_g, g);
        together[k] = fma(where_greater(x, zero, s.large, s.small()), g, together[k]);
        apart[k] = fma(first_of(s.large, n), fma(s.e, right, wrong), apart[k]);
      }
    });
    double* to = blocks.data() + 4 * number;
    for (int i = 0; i < 2; ++i) {
      to[2 * i] = static_cast<double>(sum(together[i]));
      to[2 * i + 1] = static_cast<double>(sum(apart[i]));
    }
  });
  add_blocks<T>(shape, 4, blocks.data(), totals.data());
  for (int64_t i = 0; i < shape.images; ++i) {
    const double* total = totals.data() + 4 * i;
    const DkdWeight<T> weight(rule, {total[0], total[1]}, {total[2], total[3]});
    theta[i] = weight.theta, alpha[i] = weight.alpha, beta[i] = weight.beta;
  }
}

template <class T>
void dkd_loss(const DkdShape& shape, const T* student, const T* teacher, const T* truth, const T* theta,
              double temperature, double kl_factor, T* loss, T* gradient, const Parallel& parallel) {
  const double pixels = static_cast<double>(shape.pixels);
  Heap<double> blocks(2 * shape.images * (shape.pixels / block<T> + 1)), totals(2 * shape.images);
  for_each_block<T>(shape, 40, parallel, [&](int64_t image, int64_t first, int64_t count, int64_t number) {
    const int64_t start = image * shape.pixels + first;
    const double weight = static_cast<double>(theta[image]);
    const Vec<T> zero(T(0)), per_t(static_cast<T>(1 / temperature)),
        kl_weight(static_cast<T>(weight * kl_factor / temperature / pixels)),
        minus_kl_weight = zero - kl_weight, ce_weight(static_cast<T>((1 - weight) / pixels));
    LogSum<T> of_student, of_teacher, of_map;
    Vec<T> kl(zero), ce(zero);
    for_each_vector<T>(count, [&](int64_t i, int64_t n) {
      const Vec<T> x = load(student + start + i, n), g = load(truth + start + i, n), z = x * per_t,
                   t = load(teacher + start + i, n) * per_t, below_t = minus_abs(t);
      const Logistic<T> map(minus_abs(x)), q(minus_abs(z)), p(below_t);
      of_student.add(first_of(q.e, n)), of_teacher.add(first_of(p.e, n)), of_map.add(first_of(map.e, n));
      const Vec<T> along = where_greater(t, zero, z, zero - z), u = p.small();
      kl = kl + fma(u, along + below_t, max_or_second(zero, zero - along));
      ce = ce + fma(g, zero - x, max_or_second(zero, x));
      if (gradient == nullptr) return;
      const Vec<T> v = q.small(), difference = where_greater(along, zero, u - v, v - p.large);
      const Vec<T> sigma = where_greater(x, zero, map.large, map.small());
      store(fma(where_greater(t, zero, kl_weight, minus_kl_weight), difference, ce_weight * (sigma - g)),
            gradient + start + i, n);
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
  table.dkd_theta = dkd_theta<T>;
  table.dkd_loss = dkd_loss<T>;
  table.dkd_loss_backward = dkd_loss_backward<T>;
}
SODFAST_INSTANTIATE(add_dkd)

}  // namespace SODFAST_ISA
}  // namespace sodfast
