// The CPU kernels without torch, meant for the sanitizers: every kernel, float on each instruction set and double,
// on generated shapes. `sodfast_native_tests [cases per kernel]`.
#include "check.h"

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 200;
  if (cases < 1) {
    std::fprintf(stderr, "usage: %s [cases per kernel, at least 1]\n", argv[0]);
    return 2;
  }
  sodfast::test::test_goctconv(cases);
  sodfast::test::test_depthwise(cases);
  sodfast::test::test_dilated(cases);
  sodfast::test::test_norm_act(cases);
  sodfast::test::test_norm_depthwise(cases);
  sodfast::test::test_decay(cases);
  sodfast::test::test_scfm(cases);
  sodfast::test::test_boundary(cases);
  sodfast::test::test_structure_polishing(cases);
  sodfast::test::test_dkd(cases);
  std::printf("all native tests passed\n");
  return 0;
}
