// The CUDA kernels, run on the host, on the cases of the CPU kernels; meant for the sanitizers.
// `sodfast_cuda_on_host_tests [cases per kernel]`. First the harness itself: a kernel that forgets a barrier must give
// wrong numbers in it, or the cases prove nothing about barriers.
#include "check.h"
#include "cuda/launch.h"

namespace sodfast::test {
void test_ilblock(int cases);
void test_norm_depthwise(int cases);
}  // namespace sodfast::test

namespace {

constexpr int threads = 256;

// Reverses the numbers of a block through shared memory, with the barrier that this takes or without.
template <bool barrier>
__global__ void reverse(int* numbers) {
  __shared__ int shared[threads];
  const unsigned t = threadIdx.x;
  shared[t] = numbers[t];
  if (barrier) __syncthreads();
  numbers[t] = shared[threads - 1 - t];
}

__global__ void sum_warps(int* numbers) {
  int x = numbers[threadIdx.x];
  for (int mask = 16; mask > 0; mask /= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
  numbers[threadIdx.x] = x + __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x % 32), 7);
}

int wrong_numbers(void (*kernel)(int*), const std::function<int(int)>& expected) {
  std::vector<int> numbers(threads);
  for (int i = 0; i < threads; ++i) numbers[static_cast<size_t>(i)] = i;
  if (sodfast::cuda::launch(kernel, 1, threads, nullptr, numbers.data()) != cudaSuccess) return threads;
  int wrong = 0;
  for (int i = 0; i < threads; ++i) wrong += numbers[static_cast<size_t>(i)] != expected(i);
  return wrong;
}

void test_harness() {
  const auto reversed = [](int i) { return threads - 1 - i; };
  if (const int n = wrong_numbers(reverse<true>, reversed); n > 0) sodfast::test::fail("a barrier", n, 0);
  if (wrong_numbers(reverse<false>, reversed) == 0) sodfast::test::fail("a missing barrier went unseen", 0, 1);
  // Warp w holds 32 w to 32 w + 31.
  const auto sums = [](int i) { return 32 * (32 * (i / 32)) + 31 * 16 + 7; };
  if (const int n = wrong_numbers(sum_warps, sums); n > 0) sodfast::test::fail("shuffles", n, 0);
  std::printf("ok  harness\n");
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 60;
  if (cases < 1) {
    std::fprintf(stderr, "usage: %s [cases per kernel, at least 1]\n", argv[0]);
    return 2;
  }
  test_harness();
  sodfast::test::test_goctconv(cases);
  sodfast::test::test_depthwise(cases);
  sodfast::test::test_dilated(cases);
  sodfast::test::test_norm_act(cases);
  sodfast::test::test_ilblock(cases);
  sodfast::test::test_norm_depthwise(cases);
  sodfast::test::test_decay(cases);
  sodfast::test::test_dkd(cases);
  sodfast::test::test_scfm(cases);
  sodfast::test::test_boundary(cases);
  sodfast::test::test_structure_polishing(cases);
  std::printf("all CUDA kernels passed on the host\n");
  return 0;
}
