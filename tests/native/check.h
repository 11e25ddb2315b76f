// Test helpers without torch: random numbers, exactly-sized buffers (AddressSanitizer then sees every stray access),
// comparisons, and a parallel loop that hands out its ranges backwards, so that no task can lean on another.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace sodfast::test {

inline std::mt19937_64 generator(1);

inline int64_t pick(int64_t low, int64_t high) {
  return low + static_cast<int64_t>(generator() % static_cast<uint64_t>(high - low + 1));
}
inline double normal() {
  static std::normal_distribution<double> d;
  return d(generator);
}

using Values = std::vector<double>;
inline Values random_values(int64_t n, double scale = 1) {
  Values v(static_cast<size_t>(n));
  for (double& x : v) x = scale * static_cast<double>(static_cast<float>(normal()));  // the same in float and double
  return v;
}

// A tensor list in the kernel's type; each tensor is a heap block of exactly its size.
template <class T>
class Maps {
 public:
  explicit Maps(const std::vector<Values>& values) {
    for (const Values& v : values) add(v);
  }
  Maps(const Pyramid& p, double fill) {
    for (int s = 0; s < p.scales; ++s) add(Values(static_cast<size_t>(p.batch * p.channels[s] * p.area(s)), fill));
  }
  ~Maps() {
    for (T* p : data_) std::free(p);
  }
  Maps(const Maps&) = delete;
  T* const* write() { return data_.data(); }
  const T* const* read() { return const_cast<const T* const*>(data_.data()); }
  std::vector<Values> values() const {
    std::vector<Values> out;
    for (size_t i = 0; i < data_.size(); ++i) out.emplace_back(data_[i], data_[i] + sizes_[i]);
    return out;
  }
  T* operator[](size_t i) { return data_[i]; }

 private:
  void add(const Values& v) {
    T* p = static_cast<T*>(std::malloc(v.size() * sizeof(T) + (v.empty() ? 1 : 0)));
    for (size_t i = 0; i < v.size(); ++i) p[i] = static_cast<T>(v[i]);
    data_.push_back(p);
    sizes_.push_back(v.size());
  }
  std::vector<T*> data_;
  std::vector<size_t> sizes_;
};

inline std::vector<Values> random_maps(const Pyramid& p) {
  std::vector<Values> out;
  for (int s = 0; s < p.scales; ++s) out.push_back(random_values(p.batch * p.channels[s] * p.area(s)));
  return out;
}

inline Parallel backwards() {
  return {[](int64_t n, int64_t, Parallel::Body body, void* context) {
    const int64_t step = 1 + n / 3;
    for (int64_t begin = (n - 1) / step * step; begin >= 0; begin -= step)
      body(context, begin, begin + step < n ? begin + step : n);
  }};
}

inline double dot(const std::vector<Values>& a, const std::vector<Values>& b) {
  double s = 0;
  for (size_t i = 0; i < a.size(); ++i)
    for (size_t k = 0; k < a[i].size(); ++k) s += a[i][k] * b[i][k];
  return s;
}

[[noreturn]] inline void fail(const std::string& what, double got, double limit) {
  std::printf("FAILED %s: %g, allowed %g\n", what.c_str(), got, limit);
  std::exit(1);
}

inline void expect_near(const std::string& what, double a, double b, double tolerance) {
  const double error = std::abs(a - b), limit = tolerance * (1 + std::abs(a) + std::abs(b));
  if (!(error <= limit)) fail(what, error, limit);
}

inline void expect_equal(const std::string& what, const std::vector<Values>& a, const std::vector<Values>& b,
                         double tolerance) {
  if (a.size() != b.size()) fail(what + ": lists of different length", 0, 0);
  for (size_t i = 0; i < a.size(); ++i) {
    double largest = 1, error = 0;
    if (a[i].size() != b[i].size()) fail(what + ": different sizes", 0, 0);
    for (size_t k = 0; k < a[i].size(); ++k) {
      largest = std::fmax(largest, std::abs(b[i][k]));
      const double e = std::abs(a[i][k] - b[i][k]);
      error = e <= error ? error : e;  // NaN counts as an error
    }
    if (!(error <= tolerance * largest)) fail(what, error, tolerance * largest);
  }
}

// Batch, sizes and channels as the networks and the odd cases have them.
inline Pyramid random_pyramid(int scales, int divide_by, int64_t most_channels) {
  Pyramid p;
  p.scales = scales;
  p.batch = pick(0, 9) == 0 ? 0 : pick(1, 3);
  const int64_t h = pick(0, 3) == 0 ? pick(1, 40) : pick(1, 7), w = pick(0, 3) == 0 ? pick(1, 67) : pick(1, 9);
  p.height = h * divide_by, p.width = w * divide_by;
  for (int s = 0; s < scales; ++s) p.channels[s] = pick(0, 4) == 0 ? 0 : pick(1, most_channels);
  return p;
}

// [channel][sample]: mean and Σ (x - mean)² of every plane.
inline Values moments_of(const Pyramid& maps, const std::vector<Values>& xs) {
  Values all(static_cast<size_t>(2 * maps.batch * maps.total()));
  for (int s = 0; s < maps.scales; ++s)
    for (int64_t plane = 0; plane < maps.batch * maps.channels[s]; ++plane) {
      const double* x = xs[static_cast<size_t>(s)].data() + plane * maps.area(s);
      double mean = 0, m2 = 0;
      for (int64_t i = 0; i < maps.area(s); ++i) mean += x[i] / static_cast<double>(maps.area(s));
      for (int64_t i = 0; i < maps.area(s); ++i) m2 += (x[i] - mean) * (x[i] - mean);
      const int64_t channel = maps.begin(s) + plane % maps.channels[s], sample = plane / maps.channels[s];
      all[static_cast<size_t>(2 * (channel * maps.batch + sample))] = mean;
      all[static_cast<size_t>(2 * (channel * maps.batch + sample) + 1)] = m2;
    }
  return all;
}

// Runs `cases` random cases of f for every instruction set of this machine.
inline void for_each_case(const char* name, int cases, const std::function<void(const std::string&)>& f) {
  for (int isa = 0; isa < cpu_isa_count(); ++isa) {
    set_cpu_isa(cpu_isa_name(isa));
    for (int i = 0; i < cases; ++i) {
      generator.seed(static_cast<uint64_t>(1000003 * i + 7));
      f(std::string(name) + " " + cpu_isa() + " case " + std::to_string(i));
    }
  }
  std::printf("ok  %s: %d cases x %d instruction sets\n", name, cases, cpu_isa_count());
}

void test_goctconv(int cases);
void test_depthwise(int cases);
void test_dilated(int cases);
void test_norm_act(int cases);
void test_norm_depthwise(int cases);
void test_decay(int cases);
void test_scfm(int cases);
void test_boundary(int cases);
void test_structure_polishing(int cases);
void test_dkd(int cases);

}  // namespace sodfast::test
