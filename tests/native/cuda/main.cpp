// The CUDA kernels, run on the host, on the cases of the CPU kernels; meant for the sanitizers.
// `sodfast_cuda_on_host_tests [cases per kernel]`. First the harness itself: a kernel that forgets a barrier must give
// wrong numbers in it, or the cases prove nothing about barriers; under ThreadSanitizer such a kernel must be reported
// also where the numbers come out right.
#include "check.h"
#include "cuda/launch.h"

namespace sodfast::test {
void test_ilblock(int cases);
}  // namespace sodfast::test

int races = 0;
bool races_wanted = false;

#if defined(__SANITIZE_THREAD__)
// ThreadSanitizer's question at every race: is it known? Else it prints where the two accesses are.
namespace __tsan {
class ReportDesc;
__attribute__((visibility("default"))) SODFAST_UNWATCHED bool OnReport(const ReportDesc*, bool) {
  ++races;
  return races_wanted;
}
}  // namespace __tsan
#endif

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

// The same within warps. A shuffle is no barrier for memory, but on the host it works as one.
template <bool barrier>
__global__ void reverse_warps(int* numbers) {
  __shared__ int shared[threads];
  const unsigned t = threadIdx.x;
  shared[t] = numbers[t];
  if (barrier) __syncwarp();
  numbers[t] = __shfl_sync(0xffffffffu, numbers[t], 0) * 0 + shared[t / 32 * 32 + 31 - t % 32];
}

// Adds what nobody has written yet.
__global__ void add_unwritten(int* numbers) {
  __shared__ int shared[threads];
  numbers[threadIdx.x] += shared[threadIdx.x];
  shared[threadIdx.x] = 0;
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
  const auto reversed_warps = [](int i) { return i / 32 * 32 + 31 - i % 32; };
  if (const int n = wrong_numbers(reverse_warps<true>, reversed_warps); n > 0) sodfast::test::fail("a warp's", n, 0);
  races_wanted = true;
  if (wrong_numbers(reverse<false>, reversed) == 0) sodfast::test::fail("a missing barrier went unseen", 0, 1);
#if defined(__SANITIZE_THREAD__)
  if (races == 0) sodfast::test::fail("a race went unseen", 0, 1);
  races = 0;
  wrong_numbers(reverse_warps<false>, reversed_warps);
  if (races == 0) sodfast::test::fail("a race inside warps went unseen", 0, 1);
  const auto less_one = [](int i) { return i - 1; };
  if (const int n = wrong_numbers(add_unwritten, less_one); n > 0)
    sodfast::test::fail("unwritten memory is not -1", n, 0);
#endif
  races = 0, races_wanted = false;
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
  if (races > 0) sodfast::test::fail("races, reported above", races, 0);
  std::printf("all CUDA kernels passed on the host\n");
  return 0;
}
