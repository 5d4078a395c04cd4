// SPDX-License-Identifier: Apache-2.0
// The three hooks that TVM's llvm code calls through weak pointers, so that a CPU artifact needs no TVM runtime:
// parallel loops (a pthread pool that follows torch's thread count), scratch memory (cached per thread), and one cast.
//
// A parallel region is announced by a generation counter. Workers spin on it for some microseconds, since the stages of
// one call follow each other closely, and then sleep. One region runs at a time: a second caller thread waits for its
// turn, a nested region runs inline. Regions are split by task number alone, so results do not depend on the pool.
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>

#include <tvm/ffi/c_api.h>

#define MAX_THREADS 256
#define SPIN_ITERATIONS 4000  // tens of microseconds
#define SCRATCH_SLOTS 8
#define SCRATCH_ALIGNMENT 64

typedef struct {
  void* sync_handle;
  int32_t num_task;
} TVMParallelGroupEnv;
typedef int (*FTVMParallelLambda)(int task_id, TVMParallelGroupEnv* env, void* closure);

static struct {
  pthread_mutex_t turn;   // held by the caller whose region runs
  pthread_mutex_t mutex;  // guards sleeping
  pthread_cond_t wake;
  int num_workers;  // started; worker i runs task i + 1
  atomic_uint generation;
  atomic_int unfinished;
  atomic_int status;
  FTVMParallelLambda function;
  void* closure;
  int num_tasks;
} pool = {.turn = PTHREAD_MUTEX_INITIALIZER, .mutex = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

static atomic_int num_threads = 1;
static __thread int in_region;

static inline void relax(void) { __builtin_ia32_pause(); }

static void run_task(int task) {
  TVMParallelGroupEnv env = {0, pool.num_tasks};
  int status = pool.function(task, &env, pool.closure);
  if (status != 0) atomic_store(&pool.status, status);
}

static void* work(void* argument) {
  int task = (int)(intptr_t)argument;
  // Generations count from the pool's creation; a worker is created between regions, with `turn` held.
  unsigned seen = atomic_load(&pool.generation);
  in_region = 1;
  atomic_fetch_sub(&pool.unfinished, 1);  // tells the creator that `seen` is taken
  for (;;) {
    for (int i = 0; i < SPIN_ITERATIONS && atomic_load_explicit(&pool.generation, memory_order_acquire) == seen; ++i) relax();
    if (atomic_load_explicit(&pool.generation, memory_order_acquire) == seen) {
      pthread_mutex_lock(&pool.mutex);
      while (atomic_load(&pool.generation) == seen) pthread_cond_wait(&pool.wake, &pool.mutex);
      pthread_mutex_unlock(&pool.mutex);
    }
    seen = atomic_load(&pool.generation);
    if (task < pool.num_tasks) run_task(task);
    atomic_fetch_sub_explicit(&pool.unfinished, 1, memory_order_release);
  }
  return 0;
}

static void forget_workers(void) {  // in a forked child only the forking thread exists
  pool.num_workers = 0;
  pthread_mutex_init(&pool.turn, 0);
  pthread_mutex_init(&pool.mutex, 0);
  pthread_cond_init(&pool.wake, 0);
}

static void start_workers(int wanted) {
  static int registered;
  if (!registered) registered = pthread_atfork(0, 0, forget_workers) == 0;
  while (pool.num_workers < wanted) {
    pthread_t thread;
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    atomic_store(&pool.unfinished, 1);
    int failed = pthread_create(&thread, &attributes, work, (void*)(intptr_t)(pool.num_workers + 1));
    pthread_attr_destroy(&attributes);
    if (failed) return;
    while (atomic_load(&pool.unfinished) != 0) relax();
    ++pool.num_workers;
  }
}

static int launch(FTVMParallelLambda function, void* closure, int num_tasks) {
  if (num_tasks <= 0) num_tasks = atomic_load(&num_threads);
  if (in_region || num_tasks == 1) {
    TVMParallelGroupEnv env = {0, 1};
    return function(0, &env, closure);
  }
  pthread_mutex_lock(&pool.turn);
  start_workers(num_tasks - 1);
  if (num_tasks > pool.num_workers + 1) num_tasks = pool.num_workers + 1;
  pool.function = function;
  pool.closure = closure;
  pool.num_tasks = num_tasks;
  atomic_store(&pool.status, 0);
  atomic_store(&pool.unfinished, pool.num_workers);
  pthread_mutex_lock(&pool.mutex);
  atomic_fetch_add_explicit(&pool.generation, 1, memory_order_release);
  pthread_cond_broadcast(&pool.wake);
  pthread_mutex_unlock(&pool.mutex);
  in_region = 1;
  run_task(0);
  in_region = 0;
  for (int i = 0; atomic_load_explicit(&pool.unfinished, memory_order_acquire) != 0; ++i)
    i < SPIN_ITERATIONS ? relax() : (void)sched_yield();  // more threads than free cores: let the others run
  int status = atomic_load(&pool.status);
  pthread_mutex_unlock(&pool.turn);
  return status;
}

// Scratch: a few buffers per thread, kept for the next request. Stages ask for the same sizes again and again.
typedef struct {
  void* data;
  uint64_t size;
  int used;
} ScratchSlot;

static __thread ScratchSlot scratch[SCRATCH_SLOTS];
static pthread_key_t scratch_key;
static pthread_once_t scratch_once = PTHREAD_ONCE_INIT;

static void free_scratch(void* slots) {
  for (int i = 0; i < SCRATCH_SLOTS; ++i) free(((ScratchSlot*)slots)[i].data);
}
static void make_scratch_key(void) { pthread_key_create(&scratch_key, free_scratch); }

static void* allocate(int device_type, int device_id, uint64_t num_bytes, int dtype_code, int dtype_bits) {
  (void)device_type, (void)device_id, (void)dtype_code, (void)dtype_bits;
  if (num_bytes == 0) num_bytes = 1;  // a group buffer without groups; null would read as a failure
  ScratchSlot* slot = 0;
  for (int i = 0; i < SCRATCH_SLOTS; ++i) {
    ScratchSlot* candidate = &scratch[i];
    if (candidate->used) continue;
    int fits = candidate->size >= num_bytes, best_fits = slot && slot->size >= num_bytes;
    if (!slot || (fits && (!best_fits || candidate->size < slot->size)) || (!fits && !best_fits && candidate->size > slot->size))
      slot = candidate;
  }
  if (!slot) return 0;
  if (slot->size < num_bytes) {
    pthread_once(&scratch_once, make_scratch_key);
    pthread_setspecific(scratch_key, scratch);
    free(slot->data);
    slot->size = (num_bytes + SCRATCH_ALIGNMENT - 1) / SCRATCH_ALIGNMENT * SCRATCH_ALIGNMENT;
    slot->data = aligned_alloc(SCRATCH_ALIGNMENT, slot->size);
    if (!slot->data) {
      slot->size = 0;
      return 0;
    }
  }
  slot->used = 1;
  return slot->data;
}

static int release(int device_type, int device_id, void* data) {
  (void)device_type, (void)device_id;
  for (int i = 0; i < SCRATCH_SLOTS; ++i) {
    if (scratch[i].used && scratch[i].data == data) {
      scratch[i].used = 0;
      return 0;
    }
  }
  return -1;
}

int (*__TVMBackendParallelLaunch)(FTVMParallelLambda, void*, int) = launch;
void* (*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int) = allocate;
int (*__TVMBackendFreeWorkspace)(int, int, void*) = release;

__attribute__((visibility("hidden"))) int64_t tvmmoe_address(void* pointer) { return (int64_t)(intptr_t)pointer; }

// set_num_threads(n): threads of the following calls, the caller's included.
TVM_FFI_DLL_EXPORT int __tvm_ffi_set_num_threads(void* self, const TVMFFIAny* args, int32_t num_args, TVMFFIAny* result) {
  (void)self;
  if (num_args != 1 || args[0].type_index != kTVMFFIInt) {
    TVMFFIErrorSetRaisedFromCStr("TypeError", "set_num_threads expects one int");
    return -1;
  }
  int64_t wanted = args[0].v_int64;
  atomic_store(&num_threads, wanted < 1 ? 1 : wanted > MAX_THREADS ? MAX_THREADS : (int)wanted);
  result->type_index = kTVMFFINone;
  result->v_int64 = 0;
  return 0;
}
