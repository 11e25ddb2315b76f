// Chooses the instruction set once, at the first use: the best that this machine and this build have, or the one
// that SODFAST_CPU_ISA names (to test each of them on one machine).
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/maps.h"

#define SODFAST_DECLARE(isa)                     \
  namespace isa {                                \
  template <class T>                             \
  void add_goctconv(Kernels<T>&);                \
  template <class T>                             \
  void add_goctconv_depthwise(Kernels<T>&);      \
  template <class T>                             \
  void add_goctconv_dilated(Kernels<T>&);        \
  template <class T>                             \
  void add_goctconv_norm_act(Kernels<T>&);       \
  template <class T>                             \
  void add_goctconv_norm_depthwise(Kernels<T>&); \
  template <class T>                             \
  void add_decay(Kernels<T>&);                   \
  template <class T>                             \
  void add_scfm(Kernels<T>&);                    \
  template <class T>                             \
  void add_boundary(Kernels<T>&);                \
  template <class T>                             \
  void add_dkd(Kernels<T>&);                     \
  void add_block(MapKernels&);                   \
  void add_bank(MapKernels&);                    \
  void add_conv(MapKernels&);                    \
  void add_depthwise(MapKernels&);               \
  void add_gate(MapKernels&);                    \
  void add_upsample(MapKernels&);                \
  }

namespace sodfast {
#if defined(__x86_64__)
SODFAST_DECLARE(avx512)
SODFAST_DECLARE(avx2)
SODFAST_DECLARE(sse42)
#else
SODFAST_DECLARE(neon)
#endif

namespace {

struct Isa {
  const char* name;
  Kernels<float> table;
  MapKernels maps;
};

#define SODFAST_TABLE(isa, T)                   \
  [] {                                          \
    Kernels<T> table{};                         \
    isa::add_goctconv<T>(table);                \
    isa::add_goctconv_depthwise<T>(table);      \
    isa::add_goctconv_dilated<T>(table);        \
    isa::add_goctconv_norm_act<T>(table);       \
    isa::add_goctconv_norm_depthwise<T>(table); \
    isa::add_decay<T>(table);                   \
    isa::add_scfm<T>(table);                    \
    isa::add_boundary<T>(table);                \
    isa::add_dkd<T>(table);                     \
    return table;                               \
  }()

#define SODFAST_MAPS(isa)      \
  [] {                         \
    MapKernels table{};        \
    isa::add_block(table);     \
    isa::add_bank(table);      \
    isa::add_conv(table);      \
    isa::add_depthwise(table); \
    isa::add_gate(table);      \
    isa::add_upsample(table);  \
    return table;              \
  }()

struct Isas {
  Isa list[3];
  int count = 0;
  std::atomic<int> chosen{0};

  Isas() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512cd"))
      list[count++] = {"avx512", SODFAST_TABLE(avx512, float), SODFAST_MAPS(avx512)};
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
      list[count++] = {"avx2", SODFAST_TABLE(avx2, float), SODFAST_MAPS(avx2)};
    list[count++] = {"sse4.2", SODFAST_TABLE(sse42, float), SODFAST_MAPS(sse42)};
#else
    list[count++] = {"neon", SODFAST_TABLE(neon, float), SODFAST_MAPS(neon)};
#endif
    const char* wanted = std::getenv("SODFAST_CPU_ISA");
    if (wanted != nullptr && *wanted != '\0') unknown = !choose(wanted);
  }

  bool choose(const char* name) {
    for (int i = 0; i < count; ++i) {
      if (std::strcmp(list[i].name, name) == 0) {
        chosen = i;
        return true;
      }
    }
    return false;
  }
  bool unknown = false;  // SODFAST_CPU_ISA names none of the list
};

Isas& isas() {
  static Isas all;
  return all;
}

}  // namespace

template <>
const Kernels<float>& kernels<float>() {
  return isas().list[isas().chosen].table;
}

template <>
const Kernels<double>& kernels<double>() {
#if defined(__x86_64__)
  static const Kernels<double> table = SODFAST_TABLE(sse42, double);
#else
  static const Kernels<double> table = SODFAST_TABLE(neon, double);
#endif
  return table;
}

const MapKernels& map_kernels() { return isas().list[isas().chosen].maps; }

const char* cpu_isa() { return isas().list[isas().chosen].name; }
int cpu_isa_count() { return isas().count; }
const char* cpu_isa_name(int i) { return isas().list[i].name; }
bool cpu_isa_unknown() { return isas().unknown; }
bool set_cpu_isa(const char* name) { return isas().choose(name); }

}  // namespace sodfast
