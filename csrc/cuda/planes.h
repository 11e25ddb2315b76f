// What normalising kernels share: planes (one sample and channel) as the work of a warp or a block, their moments, and
// the statistics of a batch from these.
#pragma once

#include "cuda/reduce.h"

namespace sodfast::cuda {

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
  // The offset of value j of this thread's 16 from `base` on, in fours where they are packed.
  __device__ __forceinline__ int64_t at(int64_t base, int j, bool packed) const {
    return packed ? base + (j / 4 * size + lane) * 4 + j % 4 : base + j * size + lane;
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

// This thread's 16 values from `base` on; zero past the end. Returns how many there are.
template <class T, class A>
__device__ __forceinline__ int read(const Team& team, const T* plane, int64_t base, bool packed, A (&v)[step]) {
  int count = 0;
  if (packed) {
#pragma unroll
    for (int j = 0; j < step; j += 4) {
      const int64_t i = team.at(base, j, true);
      Pack<T, 4> pack{};
      if (i < team.area) {
        pack = *reinterpret_cast<const Pack<T, 4>*>(plane + i);
        count += 4;
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) v[j + k] = i < team.area ? widen(pack.v[k]) : A(0);
    }
  } else {
#pragma unroll
    for (int j = 0; j < step; ++j) {
      const int64_t i = team.at(base, j, false);
      v[j] = i < team.area ? widen(plane[i]) : A(0);
      count += i < team.area;
    }
  }
  return count;
}
template <class T, class A>
__device__ __forceinline__ void write(const Team& team, T* plane, int64_t base, bool packed, const A (&v)[step]) {
  if (packed) {
#pragma unroll
    for (int j = 0; j < step; j += 4) {
      Pack<T, 4> pack;
#pragma unroll
      for (int k = 0; k < 4; ++k) narrow(v[j + k], pack.v[k]);
      const int64_t i = team.at(base, j, true);
      if (i < team.area) *reinterpret_cast<Pack<T, 4>*>(plane + i) = pack;
    }
  } else {
#pragma unroll
    for (int j = 0; j < step; ++j) {
      const int64_t i = team.at(base, j, false);
      if (i < team.area) narrow(v[j], plane[i]);
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
    for (int mask = 16; mask > 0; mask /= 2) {
      const double n = __shfl_xor_sync(whole_warp, count, mask), m = __shfl_xor_sync(whole_warp, mean, mask),
                   q = __shfl_xor_sync(whole_warp, m2, mask);
      add(n, m, q);
    }
    count = __shfl_sync(whole_warp, count, 0), mean = __shfl_sync(whole_warp, mean, 0);
    m2 = __shfl_sync(whole_warp, m2, 0);
  }
  // Of 16 values in registers, n of which are present and the others zero: about their own mean first.
  template <class A, class Present>
  __device__ __forceinline__ void add(const A (&v)[step], int n, const Present& present) {
    A total = 0;
#pragma unroll
    for (int j = 0; j < step; ++j) total += v[j];
    const A own = total / A(n);
    A rest = 0, square = 0;  // Σ (x - mean) is not exactly zero, since mean is rounded
#pragma unroll
    for (int j = 0; j < step; ++j) {
      const A d = present(j) ? v[j] - own : A(0);
      rest += d, square += d * d;
    }
    add(n, double(own) + double(rest / A(n)), double(square - rest * rest / A(n)));
  }
  // Over the team, written by its first thread. All threads of the block call; `shared` holds one for each warp.
  __device__ __forceinline__ void write(const Team& team, int64_t batch, Moments* shared, double* out) {
    add_up();
    if (team.size == threads) {
      if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = *this;
      __syncthreads();
      *this = Moments();
      for (int w = 0; w < warps; ++w) add(shared[w].count, shared[w].mean, shared[w].m2);
    }
    if (!team.active || team.lane != 0 || batch == 0) return;
    out += (team.channel * batch + team.b) * 2;
    out[0] = mean, out[1] = m2;
  }
};

template <class T>
__global__ void __launch_bounds__(threads) measure(const __grid_constant__ PlaneArguments<T> a) {
  using A = typename Sum<T>::type;
  __shared__ Moments shared[warps];
  const Team team(a);
  Moments moments;
  const T* x = a.xs[team.s] + team.plane * team.area;
  if (team.active) {
    for (int64_t base = 0; base < team.area; base += step * team.size) {
      A v[step];
      const int n = read(team, x, base, a.aligned[team.s], v);
      if (n == 0) break;  // only this thread's share is over
      moments.add(v, n, [&](int j) { return team.at(base, j, a.aligned[team.s]) < team.area; });
    }
  }
  moments.write(team, a.maps.batch, shared, a.partial);
}

// The mean and variance of the team's channel, of the batch from its planes' moments or the running ones; written where
// the plane is the channel's first. All threads call.
template <class T>
__device__ __forceinline__ void statistics(const Team& team, const PlaneArguments<T>& a, double& mean, double& var) {
  if (a.training) {
    Moments moments;  // every warp of the team for itself
    for (int64_t b = threadIdx.x % 32; b < a.maps.batch; b += 32) {
      const double* p = a.partial + (team.channel * a.maps.batch + b) * 2;
      if (team.active) moments.add(static_cast<double>(team.area), p[0], p[1]);
    }
    moments.add_up();
    const bool any = moments.count > 0;  // nothing to average has no mean, as 0/0
    mean = any ? moments.mean : NAN, var = any ? moments.m2 / moments.count : NAN;
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
    mean = A(m), scale = A(get<double>(a.parameters.gamma, team.channel) / sqrt(A(var + a.eps)));
    beta = get<A>(a.parameters.beta, team.channel), slope = get<A>(a.parameters.slope, team.channel);
  }
  __device__ __forceinline__ A operator()(A x) const { return prelu((x - mean) * scale + beta, slope); }
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
