// Each kernel source adds its functions to the table of the instruction set it is compiled for. SODFAST_ISA names
// that set (a namespace); the baseline, which every machine runs, also compiles float64.
#pragma once

#include "cpu/kernels.h"

#ifndef SODFAST_ISA
#error "compile kernel sources with -DSODFAST_ISA=<name>"
#endif

#ifdef SODFAST_BASELINE
#define SODFAST_INSTANTIATE(function)             \
  template void function<float>(Kernels<float>&); \
  template void function<double>(Kernels<double>&);
#else
#define SODFAST_INSTANTIATE(function) template void function<float>(Kernels<float>&);
#endif

namespace sodfast {
namespace SODFAST_ISA {
template <class T>
void add_goctconv(Kernels<T>&);
template <class T>
void add_goctconv_depthwise(Kernels<T>&);
template <class T>
void add_goctconv_dilated(Kernels<T>&);
template <class T>
void add_goctconv_norm_act(Kernels<T>&);
template <class T>
void add_goctconv_norm_depthwise(Kernels<T>&);
template <class T>
void add_decay(Kernels<T>&);
template <class T>
void add_scfm(Kernels<T>&);
template <class T>
void add_boundary(Kernels<T>&);
template <class T>
void add_dkd(Kernels<T>&);
}  // namespace SODFAST_ISA
}  // namespace sodfast
