// What normalising kernels share: planes (one sample and channel) as the work of a warp or a block, their moments, and
// the statistics of a batch from these.
#pragma once

#include "cuda/reduce.h"

namespace sodfast::cuda {

// __launch_bounds__(threads, n): n blocks fit a multiprocessor. Left alone, one kernel took all 255 registers.
constexpr int threads = 256, warps = threads / 32, step = 16, large_plane = 2048;

template <class T>
struct PlaneArguments {
  Pyramid maps;
  const T* xs[max_scales];
  const T* gys[max_scales];
  T* ys[max_scales];         // backward: the gradients to the inputs
  bool aligned[max_scales];  // planes of whole, aligned packs
  NormActParameters parameters;
  Vector mean, var, running_mean, running_var, channel_means, ggamma, gbeta, gslope;
  Vector kernel, gkernel;  // of a depthwise 3x3 behind the norm
  double eps;
  bool training;
  double* partial;  // [channel][sample][values]
  double* moments;  // as partial, of what a kernel writes; null: not asked for
  BlockRanges blocks;
};

// The plane that a thread works on, and its place among those who do.
struct Team {
  int s, size, lane;  // size: 32, or a whole block
  int64_t b, c, channel, area, plane;
  bool active;  // else beyond the last plane
  template <class T>
  __device__ __forceinline__ explicit Team(const PlaneArguments<T>& a) {
    int64_t rest;
    s = a.blocks.find(blockIdx.x, a.maps.scales, rest);
    area = a.maps.area(s);
    size = area > large_plane ? threads : 32;
    lane = static_cast<int>(threadIdx.x) % size;
    plane = rest * (threads / size) + static_cast<int>(threadIdx.x) / size;
    const int64_t samples = a.maps.batch > 0 ? a.maps.batch : 1;  // an empty batch still has parameters
    active = plane < samples * a.maps.channels[s];
    b = active ? divide(plane, a.maps.channels[s], c) : 0;
    c = active ? c : 0;
    channel = a.maps.begin(s) + c;
    if (a.maps.batch == 0) area = 0;
  }
  // The team's next values from `base` on: how many there are, and which of them is value j of this thread's 16, in
  // fours where they are packed. 32 bits, as 16 addresses of 64 would take all registers.
  __device__ __forceinline__ int left(int64_t base) const {
    return static_cast<int>(least<int64_t>(area - base, step * size));
  }
  __device__ __forceinline__ int at(int j, bool packed) const {
    return packed ? (j / 4 * size + lane) * 4 + j % 4 : j * size + lane;
  }
  // Sums over the team, the same in every thread of it.
  template <int n>
  __device__ __forceinline__ void add_up(double (&x)[n], double* shared) const {
    if (size == threads) {
      block_sums(x, shared, warps);
    } else {
#pragma unroll
      for (int k = 0; k < n; ++k) x[k] = warp_sum(x[k]);
    }
  }
};

// This thread's 16 values from `base` on, as they are stored: whoever widens them waits for them. Zero past the end.
// Returns how many there are.
template <class T>
__device__ __forceinline__ int read(const Team& team, const T* plane, int64_t base, bool packed, T (&v)[step]) {
  int count = 0;
  const int left = team.left(base);
  plane += base;
  if (packed) {
#pragma unroll
    for (int j = 0; j < step; j += 4) {
      const int i = team.at(j, true);
      Pack<T, 4> pack{};
      if (i < left) {
        pack = *reinterpret_cast<const Pack<T, 4>*>(plane + i);
        count += 4;
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) v[j + k] = pack.v[k];
    }
  } else {
#pragma unroll
    for (int j = 0; j < step; ++j) {
      const int i = team.at(j, false);
      v[j] = i < left ? plane[i] : T{};
      count += i < left;
    }
  }
  return count;
}
template <class T, class A>
__device__ __forceinline__ void write(const Team& team, T* plane, int64_t base, bool packed, const A (&v)[step]) {
  const int left = team.left(base);
  plane += base;
  if (packed) {
#pragma unroll
    for (int j = 0; j < step; j += 4) {
      Pack<T, 4> pack;
#pragma unroll
      for (int k = 0; k < 4; ++k) narrow(v[j + k], pack.v[k]);
      const int i = team.at(j, true);
      if (i < left) *reinterpret_cast<Pack<T, 4>*>(plane + i) = pack;
    }
  } else {
#pragma unroll
    for (int j = 0; j < step; ++j) {
      const int i = team.at(j, false);
      if (i < left) narrow(v[j], plane[i]);
    }
  }
}

struct Moments {
  double count = 0, mean = 0, m2 = 0;  // m2: Σ (x - mean)²
  __device__ __forceinline__ void add(double n, double other_mean, double other_m2) {
    const double all = count + n;
    if (n == 0) return;
    const double delta = other_mean - mean, part = n / all;
    mean += delta * part;
    m2 += other_m2 + delta * delta * count * part;
    count = all;
  }
  // Over the warp; the same in every lane.
  __device__ __forceinline__ void add_up() {
    const double all = warp_sum(count), together = warp_sum(count * mean);
    const double new_mean = all > 0 ? together / all : 0, delta = mean - new_mean;
    m2 = warp_sum(m2 + count * delta * delta);
    count = all, mean = new_mean;
  }
  // Over the team, written by its first thread. All threads of the block call; `shared` holds one for each warp.
  __device__ __forceinline__ void write(const Team& team, int64_t batch, Moments* shared, double* out) {
    add_up();
    if (team.size == threads) {
      if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = *this;
      __syncthreads();
      *this = threadIdx.x % 32 < warps ? shared[threadIdx.x % 32] : Moments();
      add_up();
    }
    if (!team.active || team.lane != 0 || batch == 0) return;
    out += (team.channel * batch + team.b) * 2;
    out[0] = mean, out[1] = m2;
  }
};

// What a thread finds, in sums about the mean of its first values: squares keep their digits beside a large mean, and
// nothing is divided on the way. In float64 from one flush() to the next, some 16 values.
template <class A>
struct ThreadMoments {
  A pivot = 0, some = 0, squares = 0;
  int fresh = 0;
  double count = 0, sum = 0, square = 0;
  // Of m values in registers, n of which are present and the others zero.
  template <int m, class Present>
  __device__ __forceinline__ void add(const A (&v)[m], int n, const Present& present) {
    if (count == 0 && fresh == 0) {
      A total = 0;
#pragma unroll
      for (int j = 0; j < m; ++j) total += v[j];
      pivot = total / A(n);
    }
#pragma unroll
    for (int j = 0; j < m; ++j) {
      const A d = present(j) ? v[j] - pivot : A(0);
      some += d, squares += d * d;
    }
    fresh += n;
  }
  __device__ __forceinline__ void flush() {
    count += fresh, sum += some, square += squares;
    some = squares = 0, fresh = 0;
  }
  __device__ __forceinline__ Moments moments() const {
    if (count == 0) return {};
    const double rest = sum / count;
    return {count, pivot + rest, square - sum * rest};
  }
};

template <class T>
__global__ void __launch_bounds__(threads, 3) measure(const __grid_constant__ PlaneArguments<T> a) {
  using A = typename Sum<T>::type;
  __shared__ Moments shared[warps];
  const Team team(a);
  ThreadMoments<A> sums;
  const bool packed = a.aligned[team.s];
  const T* x = a.xs[team.s] + team.plane * team.area;
  if (team.active) {
    for (int64_t base = 0; base < team.area; base += step * team.size) {
      T stored[step];
      A v[step];
      const int n = read(team, x, base, packed, stored), left = team.left(base);
      if (n == 0) break;  // only this thread's share is over
#pragma unroll
      for (int j = 0; j < step; ++j) v[j] = widen(stored[j]);
      sums.add(v, n, [&](int j) { return team.at(j, packed) < left; });
      sums.flush();
    }
  }
  sums.moments().write(team, a.maps.batch, shared, a.partial);
}

// The mean and variance of the team's channel, of the batch from its planes' moments or the running ones; written where
// the plane is the channel's first. All threads call.
template <class T>
__device__ __forceinline__ void statistics(const Team& team, const PlaneArguments<T>& a, double& mean, double& var) {
  if (a.training) {
    // Planes of one size: the mean of their means, and the squares about that. Every warp of the team for itself.
    const double* p = a.partial + team.channel * a.maps.batch * 2;
    const int64_t batch = a.maps.batch, first = threadIdx.x % 32;
    double sum = 0, squares = 0;
    for (int64_t b = first; b < batch; b += 32) sum += p[b * 2];
    mean = warp_sum(sum) / static_cast<double>(batch);  // 0/0 where there is nothing to average
    for (int64_t b = first; b < batch; b += 32) {
      const double delta = p[b * 2] - mean;
      squares += p[b * 2 + 1] + static_cast<double>(team.area) * delta * delta;
    }
    var = warp_sum(squares) / (static_cast<double>(batch) * static_cast<double>(team.area));
  } else {
    mean = get<double>(a.running_mean, team.channel), var = get<double>(a.running_var, team.channel);
  }
  if (team.active && team.b == 0 && team.lane == 0) put(a.mean, team.channel, mean), put(a.var, team.channel, var);
}

// The forward of one channel.
template <class A>
struct NormAct {
  A mean, scale, beta, slope;
  template <class T>
  __device__ __forceinline__ NormAct(const PlaneArguments<T>& a, const Team& team) {
    double m, var;
    statistics(team, a, m, var);
    mean = A(m), scale = get<A>(a.parameters.gamma, team.channel) / sqrt(A(var + a.eps));
    beta = get<A>(a.parameters.beta, team.channel), slope = get<A>(a.parameters.slope, team.channel);
  }
  __device__ __forceinline__ A operator()(A x) const { return prelu((x - mean) * scale + beta, slope); }
  // The one that makes zeros of zeros.
  __device__ __forceinline__ NormAct of_zeros() const {
    NormAct none = *this;
    none.mean = none.beta = 0, none.scale = none.slope = 1;  // 0 · NaN is none
    return none;
  }
};

// What the backward needs of its channel.
template <class A>
struct Channel {
  A mean, inverse, gamma, beta, slope;
  template <class T>
  __device__ __forceinline__ Channel(const PlaneArguments<T>& a, int64_t c)
      : mean(get<A>(a.mean, c)),
        inverse(A(1) / sqrt(A(get<double>(a.var, c) + a.eps))),
        gamma(get<A>(a.parameters.gamma, c)),
        beta(get<A>(a.parameters.beta, c)),
        slope(get<A>(a.parameters.slope, c)) {}
};

template <class T>
PlaneArguments<T> plane_arguments(const Pyramid& maps, Pointers xs, Pointers gys, MutablePointers ys) {
  PlaneArguments<T> a{};
  a.maps = maps;
  const int64_t samples = maps.batch > 0 ? maps.batch : 1;
  for (int s = 0; s < maps.scales; ++s) {
    a.xs[s] = static_cast<const T*>(xs[s]), a.ys[s] = static_cast<T*>(ys[s]);
    uintptr_t all = reinterpret_cast<uintptr_t>(xs[s]) | reinterpret_cast<uintptr_t>(ys[s]);
    if (gys != nullptr) {
      a.gys[s] = static_cast<const T*>(gys[s]);
      all |= reinterpret_cast<uintptr_t>(gys[s]);
    }
    a.aligned[s] = maps.area(s) % 4 == 0 && all % (4 * sizeof(T)) == 0;
    const int64_t planes_per_block = maps.area(s) > large_plane ? 1 : warps;
    a.blocks.first[s + 1] = a.blocks.first[s] + divide_up<int64_t>(samples * maps.channels[s], planes_per_block);
  }
  return a;
}

}  // namespace sodfast::cuda
