// The rest of the stand-in: launching kernels, the driver that Triton and Inductor call, cuBLAS and NCCL.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <cstring>

#include "standin.h"

namespace {

CUresult module(CUmodule* out) {
  *out = static_cast<CUmodule>(malloc(1));
  return CUDA_SUCCESS;
}

}  // namespace

extern "C" {

// --- kernels ---

// between <<< and >>>
struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};
static thread_local Configuration configuration;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  configuration = {grid, block, shared, stream};
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared = configuration.shared;
  *static_cast<cudaStream_t*>(stream) = configuration.stream;
  return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t stream) {
  return static_cast<cudaError_t>(standin_launch_on(stream));
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void*, void**) {
  return static_cast<cudaError_t>(standin_launch_on(config->stream));
}

cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t stream) {
  return static_cast<cudaError_t>(standin_launch_on(stream));
}

CUresult cuLaunchKernel(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                        CUstream stream, void**, void**) {
  return static_cast<CUresult>(standin_launch_on(stream));
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction, void**, void**) {
  return static_cast<CUresult>(standin_launch_on(config->hStream));
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* out, const void*) {
  memset(out, 0, sizeof *out);
  out->maxThreadsPerBlock = 1024;
  out->numRegs = 32;
  out->binaryVersion = out->ptxVersion = 90;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* count, const void*, int, size_t) {
  *count = 2;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* count, const void*, int, size_t, unsigned) {
  *count = 2;
  return cudaSuccess;
}

void** __cudaRegisterFatBinary(void*) { return static_cast<void**>(malloc(1)); }

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  *function = reinterpret_cast<void*>(+[] { return CUDA_SUCCESS; });
  if (found) *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

// --- the driver, for Triton's and Inductor's launchers ---

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  *device = ordinal;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice) {
  *value = standin::attribute(which);
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned*, int* active) {
  *active = 1;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* context) {
  static int only;
  *context = reinterpret_cast<CUcontext>(&only);
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) { return cuCtxGetCurrent(context); }
CUresult cuModuleLoad(CUmodule* out, const char*) { return module(out); }
CUresult cuModuleLoadData(CUmodule* out, const void*) { return module(out); }
CUresult cuModuleGetFunction(CUfunction* function, CUmodule, const char*) {
  *function = static_cast<CUfunction>(malloc(1));
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute which, CUfunction) {
  *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : which == CU_FUNC_ATTRIBUTE_NUM_REGS ? 32 : 0;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void* value, CUpointer_attribute which, CUdeviceptr pointer) {
  if (which != CU_POINTER_ATTRIBUTE_DEVICE_POINTER) return CUDA_ERROR_NOT_SUPPORTED;
  *static_cast<CUdeviceptr*>(value) = pointer;
  return standin::is_block(reinterpret_cast<void*>(pointer)) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuGetErrorString(CUresult, const char** words) {
  *words = "an error of the stand-in";
  return CUDA_SUCCESS;
}

// --- cuBLAS and NCCL: what hands something out ---

int cublasCreate_v2(void** handle) { return *handle = malloc(1), 0; }
int cublasLtMatmulDescCreate(void** descriptor) { return *descriptor = malloc(1), 0; }
int cublasLtMatmulPreferenceCreate(void** preference) { return *preference = malloc(1), 0; }
int cublasLtMatrixLayoutCreate(void** layout) { return *layout = malloc(1), 0; }
int cublasGetPointerMode_v2(void*, int* mode) { return *mode = 0; }
int cublasGetMathMode(void*, int* mode) { return *mode = 0; }

int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void* result, int* found) {
  constexpr size_t kResult = 96;  // bytes of a cublasLtMatmulHeuristicResult_t
  memset(result, 0, kResult);
  *found = 1;
  return 0;
}

struct UniqueId {
  char bytes[128];
};

struct Communicator {
  int ranks;
};

int ncclGetVersion(int* version) { return *version = 22809, 0; }
int ncclCommGetAsyncError(void*, int* error) { return *error = 0; }

int ncclCommInitRank(Communicator** out, int ranks, UniqueId, int) { return *out = new Communicator{ranks}, 0; }
int ncclCommInitRankConfig(Communicator** out, int ranks, UniqueId id, int rank, void*) {
  return ncclCommInitRank(out, ranks, id, rank);
}

int ncclAllReduce(void*, void*, size_t, int, int, Communicator*, cudaStream_t stream) {
  return standin_collective(stream);
}
int ncclBroadcast(void*, void*, size_t, int, int, Communicator*, cudaStream_t stream) {
  return standin_collective(stream);
}
int ncclAllGather(void*, void*, size_t, int, Communicator*, cudaStream_t stream) { return standin_collective(stream); }
int ncclReduceScatter(void*, void*, size_t, int, int, Communicator*, cudaStream_t stream) {
  return standin_collective(stream);
}

}  // extern "C"
