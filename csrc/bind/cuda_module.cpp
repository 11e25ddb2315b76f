// The Python module sodfast._C_cuda: importing it registers the CUDA kernels of torch.ops.sodfast, whose schemas
// sodfast._C has defined. Python imports it only where torch has CUDA.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "The CUDA kernels of sodfast; importing it registers them with torch.ops.sodfast.";
  m.def("build_info", [] {
    return std::map<std::string, std::string>{{"compiler", SODFAST_CUDA_COMPILER},
                                              {"architectures", SODFAST_CUDA_ARCHITECTURES},
                                              {"version", SODFAST_VERSION}};
  });
}
