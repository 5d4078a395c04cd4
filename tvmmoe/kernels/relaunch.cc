// SPDX-License-Identifier: Apache-2.0
// A call like one that passed validation is launched without being validated again: the host side of tvmmoe.relaunch.
//
//   setup(exchange_api, Tensor, Parameter, int, float)   torch's capsule and the types whose values are looked at
//   describe(argument, slot, alignment, role)            its place among the entry's pointers (-1: none); in order
//   learn(call, result, entry, set_num_threads, workspace_bytes, is_alignment_checked, num_pointers, ints..., factor)
//   launch(call, result, num_threads) -> bool            false if nothing was launched
//   forget()
//
// `call` is the tuple of all arguments, `result` the output that was made for it, or None: Python objects by their
// addresses, which the caller keeps alive. Boxing some forty arguments one by one took longer than everything here.
//
// Alike are calls whose signatures are equal: of every argument the exact type; the dtype, shape and device of a tensor;
// the value of an int or float; which object it is otherwise (None, a bool, a member of an enum). Tensors must be contiguous.
// What depends on addresses is looked at in every call: alignment, and that no tensor which is written overlaps one that
// comes with the call. Where anything is new or odd the answer is false and the caller validates.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <string_view>
#include <unordered_map>
#include <vector>

#include <tvm/ffi/c_api.h>
#include <tvm/ffi/extra/c_env_api.h>

// Of Python's stable ABI, declared here so that one build serves every Python; the process has them.
extern "C" {
struct PyObject;
PyObject* PyTuple_GetItem(PyObject* tuple, intptr_t index);
PyObject* PyObject_Type(PyObject* object);
void Py_DecRef(PyObject* object);
long long PyLong_AsLongLongAndOverflow(PyObject* object, int* overflow);
double PyFloat_AsDouble(PyObject* object);
void* PyCapsule_GetPointer(PyObject* capsule, const char* name);
void* PyEval_SaveThread();
void PyEval_RestoreThread(void* state);
void PyErr_Clear();
}

namespace {

constexpr int kMaxArguments = 64;
constexpr int kMaxDims = 4;
constexpr size_t kMaxPlans = 4096;

enum Role { kKept = 0, kOfThisCall = 1, kWritten = 2 };

struct Description {
  int slot;
  uint64_t alignment;
  int role;
};

const DLPackExchangeAPI* torch_api;
PyObject *tensor_type, *parameter_type, *int_type, *float_type;
Description descriptions[kMaxArguments];
int num_descriptions = 0;

uint64_t address_of(const DLTensor& tensor) { return reinterpret_cast<uint64_t>(tensor.data) + tensor.byte_offset; }

uint64_t bytes_of(const DLTensor& tensor) {
  uint64_t bits = static_cast<uint64_t>(tensor.dtype.bits) * tensor.dtype.lanes;
  for (int i = 0; i < tensor.ndim; ++i) bits *= tensor.shape[i];
  return (bits + 7) / 8;
}

bool is_contiguous(const DLTensor& tensor) {
  int64_t expected = 1;
  for (int i = tensor.ndim - 1; tensor.strides != nullptr && i >= 0; --i) {
    if (tensor.shape[i] == 1) continue;
    if (tensor.strides[i] != expected) return false;
    expected *= tensor.shape[i];
  }
  return true;
}

// The arguments of one call.
struct Call {
  DLTensor tensors[kMaxArguments];
  bool is_tensor[kMaxArguments];
  int64_t signature[kMaxArguments * (3 + kMaxDims)];
  size_t size = 0;

  // False for what no learned call has: a tensor without memory or with gaps, an int of more than 64 bits.
  bool take(PyObject* call, PyObject* result) {
    for (int i = 0; i < num_descriptions; ++i) {
      if (!take(i, i + 1 < num_descriptions ? PyTuple_GetItem(call, i) : result)) return false;
    }
    return true;
  }

  bool take(int i, PyObject* object) {
    PyObject* type = PyObject_Type(object);
    Py_DecRef(type);  // the object holds it
    signature[size++] = reinterpret_cast<int64_t>(type);
    is_tensor[i] = type == tensor_type || type == parameter_type;
    if (is_tensor[i]) return append(object, tensors[i]);
    if (type == int_type) {
      int overflow = 0;
      signature[size++] = PyLong_AsLongLongAndOverflow(object, &overflow);
      return overflow == 0;
    }
    if (type == float_type) {
      double value = PyFloat_AsDouble(object);
      std::memcpy(&signature[size++], &value, sizeof(value));
      return true;
    }
    signature[size++] = reinterpret_cast<int64_t>(object);
    return true;
  }

  bool append(PyObject* object, DLTensor& tensor) {
    if (torch_api->dltensor_from_py_object_no_sync(object, &tensor) != 0) {
      PyErr_Clear();
      return false;
    }
    if (tensor.ndim > kMaxDims || address_of(tensor) == 0 || !is_contiguous(tensor)) return false;
    signature[size++] = static_cast<int64_t>(tensor.ndim) | static_cast<int64_t>(tensor.dtype.code) << 8 |
                        static_cast<int64_t>(tensor.dtype.bits) << 16 | static_cast<int64_t>(tensor.dtype.lanes) << 24;
    signature[size++] = static_cast<int64_t>(tensor.device.device_type) << 32 | tensor.device.device_id;
    for (int i = 0; i < tensor.ndim; ++i) signature[size++] = tensor.shape[i];
    return true;
  }

  std::string_view bytes() const { return {reinterpret_cast<const char*>(signature), size * sizeof(signature[0])}; }

  DLDevice device() const {
    for (int i = 0; i < num_descriptions; ++i) {
      if (is_tensor[i]) return tensors[i].device;
    }
    return {kDLCPU, 0};
  }

  // Whether the addresses are as validation wants them.
  bool may_lie_there(bool is_alignment_checked) const {
    for (int i = 0; i < num_descriptions; ++i) {
      if (!is_tensor[i]) continue;
      if (is_alignment_checked && address_of(tensors[i]) % descriptions[i].alignment != 0) return false;
      if (descriptions[i].role == kWritten && overlaps_others(i)) return false;
    }
    return true;
  }

  bool overlaps_others(int written) const {
    const uint64_t start = address_of(tensors[written]), end = start + bytes_of(tensors[written]);
    for (int i = 0; i < num_descriptions; ++i) {
      if (i == written || !is_tensor[i] || descriptions[i].role == kKept) continue;
      if (address_of(tensors[i]) < end && start < address_of(tensors[i]) + bytes_of(tensors[i])) return true;
    }
    return false;
  }
};

class Function {
 public:
  explicit Function(const TVMFFIAny& function) : handle_(function.type_index == kTVMFFIFunction ? function.v_obj : nullptr) {
    if (handle_ != nullptr) TVMFFIObjectIncRef(handle_);
  }
  Function(const Function&) = delete;
  Function& operator=(const Function&) = delete;
  ~Function() {
    if (handle_ != nullptr) TVMFFIObjectDecRef(handle_);
  }
  explicit operator bool() const { return handle_ != nullptr; }
  int operator()(TVMFFIAny* arguments, int count) const {
    TVMFFIAny ignored{};
    return TVMFFIFunctionCall(handle_, arguments, count, &ignored);
  }

 private:
  TVMFFIObject* handle_;
};

TVMFFIAny of_int(int64_t value) {
  TVMFFIAny any{};
  any.type_index = kTVMFFIInt;
  any.v_int64 = value;
  return any;
}

void ignore(void*, const char*, const char*) {}  // no memory: torch says it better when the caller allocates

// How calls of one signature run.
struct Plan {
  Function entry, set_num_threads;
  int64_t workspace_bytes;
  bool is_alignment_checked;
  std::vector<TVMFFIAny> values;  // of the entry; workspace and pointers are filled in
  std::vector<int64_t> signature;

  // Allocates the workspace and calls the entry; `launched` stays false if there was no memory.
  int run(const Call& call, int64_t num_threads, bool* launched) const {
    TVMFFIAny arguments[2 * kMaxArguments];
    std::memcpy(arguments, values.data(), values.size() * sizeof(TVMFFIAny));
    for (int i = 0; i < num_descriptions; ++i) {
      const int slot = descriptions[i].slot;
      if (call.is_tensor[i] && slot >= 0) arguments[1 + slot] = of_int(address_of(call.tensors[i]));
    }
    DLTensor prototype{};
    int64_t shape = workspace_bytes;
    prototype.device = call.device();
    prototype.dtype = {kDLUInt, 8, 1};
    prototype.ndim = 1;
    prototype.shape = &shape;
    DLManagedTensorVersioned* workspace = nullptr;
    if (torch_api->managed_tensor_allocator(&prototype, &workspace, nullptr, ignore) != 0) return 0;
    arguments[0].type_index = kTVMFFIDLTensorPtr;
    arguments[0].v_ptr = &workspace->dl_tensor;
    TVMFFIAny threads = of_int(num_threads);
    int status = set_num_threads ? set_num_threads(&threads, 1) : 0;
    if (status == 0) status = entry(arguments, values.size());
    workspace->deleter(workspace);
    *launched = status == 0;
    return status;
  }
};

std::mutex mutex;  // of plans
// Keys lie in the plans. Never destroyed: at exit nobody says in which order libraries go.
auto& plans = *new std::unordered_map<std::string_view, std::shared_ptr<const Plan>>;

std::shared_ptr<const Plan> find(const Call& call) {
  std::lock_guard<std::mutex> lock(mutex);
  auto found = plans.find(call.bytes());
  return found == plans.end() ? nullptr : found->second;
}

PyObject* object_of(const TVMFFIAny& address) { return reinterpret_cast<PyObject*>(address.v_int64); }

}  // namespace

extern "C" {

TVM_FFI_DLL_EXPORT int __tvm_ffi_setup(void*, const TVMFFIAny* args, int32_t, TVMFFIAny* result) {
  torch_api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(object_of(args[0]), "dlpack_exchange_api"));
  if (torch_api == nullptr) PyErr_Clear();
  tensor_type = object_of(args[1]);
  parameter_type = object_of(args[2]);
  int_type = object_of(args[3]);
  float_type = object_of(args[4]);
  result->type_index = kTVMFFIBool;
  result->v_int64 = torch_api != nullptr && torch_api->header.version.major == DLPACK_MAJOR_VERSION &&
                    torch_api->dltensor_from_py_object_no_sync != nullptr && torch_api->current_work_stream != nullptr;
  return 0;
}

TVM_FFI_DLL_EXPORT int __tvm_ffi_describe(void*, const TVMFFIAny* args, int32_t, TVMFFIAny*) {
  num_descriptions = std::max(num_descriptions, static_cast<int>(args[0].v_int64) + 1);  // two threads may describe
  descriptions[args[0].v_int64] = {static_cast<int>(args[1].v_int64), static_cast<uint64_t>(args[2].v_int64),
                                   static_cast<int>(args[3].v_int64)};
  return 0;
}

TVM_FFI_DLL_EXPORT int __tvm_ffi_learn(void*, const TVMFFIAny* args, int32_t num_args, TVMFFIAny*) {
  constexpr int kFirstInt = 7;
  Call call;
  if (!call.take(object_of(args[0]), object_of(args[1]))) return 0;
  std::vector<TVMFFIAny> values(1 + args[6].v_int64, of_int(0));
  values.insert(values.end(), args + kFirstInt, args + num_args);
  std::vector<int64_t> signature(call.signature, call.signature + call.size);
  std::shared_ptr<const Plan> plan(new Plan{Function(args[2]), Function(args[3]), args[4].v_int64, args[5].v_int64 != 0,
                                            std::move(values), std::move(signature)});
  std::string_view key(reinterpret_cast<const char*>(plan->signature.data()), call.bytes().size());
  std::lock_guard<std::mutex> lock(mutex);
  if (plans.size() == kMaxPlans) plans.clear();
  plans.emplace(key, std::move(plan));
  return 0;
}

TVM_FFI_DLL_EXPORT int __tvm_ffi_launch(void*, const TVMFFIAny* args, int32_t, TVMFFIAny* result) {
  result->type_index = kTVMFFIBool;
  result->v_int64 = 0;
  Call call;
  if (!call.take(object_of(args[0]), object_of(args[1]))) return 0;
  const std::shared_ptr<const Plan> plan = find(call);
  if (plan == nullptr || !call.may_lie_there(plan->is_alignment_checked)) return 0;
  const DLDevice device = call.device();
  const bool has_stream = device.device_type != kDLCPU;
  void *stream = nullptr, *stream_before = nullptr;
  if (has_stream) {
    if (torch_api->current_work_stream(device.device_type, device.device_id, &stream) != 0) {
      PyErr_Clear();
      return 0;
    }
    TVMFFIEnvSetStream(device.device_type, device.device_id, stream, &stream_before);
  }
  bool launched = false;
  void* state = PyEval_SaveThread();
  const int status = plan->run(call, args[2].v_int64, &launched);
  PyEval_RestoreThread(state);
  if (has_stream) TVMFFIEnvSetStream(device.device_type, device.device_id, stream_before, nullptr);
  result->v_int64 = launched;
  return status;
}

TVM_FFI_DLL_EXPORT int __tvm_ffi_forget(void*, const TVMFFIAny*, int32_t, TVMFFIAny*) {
  std::lock_guard<std::mutex> lock(mutex);
  plans.clear();
  return 0;
}

}  // extern "C"
