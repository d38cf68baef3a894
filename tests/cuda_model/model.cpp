// Every thread runs on a fiber with its own stack, so that it can wait while others run. Fibers are
// entered through ucontext and then switched by _setjmp and _longjmp, which make no system calls.
#undef _FORTIFY_SOURCE  // The fortified longjmp rejects jumps to another stack.
#include "model.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <exception>
#include <mutex>
#include <new>
#include <numeric>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_model {
namespace {

constexpr std::size_t page = 64 * 1024;  // the largest page size in use
constexpr std::size_t stack_bytes = 64 * 1024;
constexpr std::size_t shared_limit = 48 * 1024, shared_alignment = 16, canary_bytes = 128;
constexpr unsigned char poison = 0xff;

struct Fiber {
  Guarded stack{stack_bytes};
  ucontext_t context;
  jmp_buf place;
  bool entered = false;
};

enum class State { ready, at_block_barrier, at_warp_operation, exited };

struct Thread {
  uint3 index;
  State state = State::ready;
  Fiber* fiber = nullptr;  // null until the thread starts
  // The operation for which it waits, and the operands of a warp operation.
  const char* operation = nullptr;
  Site site{};
  unsigned mask = 0;
  std::uint64_t bits = 0;
  int source = 0;  // the lane that it reads, or every_lane
  std::uint64_t result = 0;
};

constexpr int every_lane = -1;  // reads the mask of lanes with non-zero bits

struct Aborted {};  // thrown into the waiting threads of a launch that has failed

std::int64_t order = forward;
Launcher other_launcher = nullptr;
std::mt19937_64 random_order;

// The current launch.
std::mutex one_at_a_time;
const std::function<void()>* body;
char* shared_start;
std::vector<Thread> threads;  // of the running block
Thread* warp;                 // first thread of the running warp
int lanes;                    // threads in the warp, possibly fewer than 32 in the block's last
std::vector<int> turns;       // order in which the lanes run
Thread* running = nullptr;
std::exception_ptr thrown;
std::string misaligned;  // the first misaligned access of the block
bool aborting = false;

std::vector<Fiber*> idle_fibers;  // reused by every launch, never freed
jmp_buf scheduler;

std::string text(unsigned x, unsigned y, unsigned z) {
  std::ostringstream out;
  out << '(' << x << ", " << y << ", " << z << ')';
  return out.str();
}

std::string text(const Thread& thread) {
  return "thread " + text(thread.index.x, thread.index.y, thread.index.z);
}

std::string text(const char* operation, Site site) {
  return std::string(operation) + " at " + site.file + ":" + std::to_string(site.line);
}

std::string hex(unsigned mask) {
  std::ostringstream out;
  out << "0x" << std::hex << mask;
  return out.str();
}

[[noreturn]] void fail(const std::string& what) {
  throw std::runtime_error("block " + text(blockIdx.x, blockIdx.y, blockIdx.z) + ": " + what);
}

template <typename Index>
std::vector<Index> in_order(std::size_t count) {
  std::vector<Index> indices(count);
  std::iota(indices.begin(), indices.end(), Index(0));
  if (order < 0) std::reverse(indices.begin(), indices.end());
  if (order > 0) std::shuffle(indices.begin(), indices.end(), random_order);
  return indices;
}

Thread* next_in_warp() {
  for (const int lane : turns) {
    if (lane < lanes && warp[lane].state == State::ready) return &warp[lane];
  }
  return nullptr;
}

void select(Thread& thread) {
  running = &thread;
  threadIdx = thread.index;
}

// Not inlined, because setjmp may lose variables of the calling function.
__attribute__((noinline)) void jump(jmp_buf from, jmp_buf to) {
  if (_setjmp(from) == 0) _longjmp(to, 1);
}

// A fiber runs threads one after another until one has to wait. Kernels without barriers therefore
// need no switches.
void run_fiber() {
  Fiber* fiber = running->fiber;
  while (true) {
    Thread* thread = running;
    do {
      select(*thread);
      thread->fiber = fiber;
      try {
        (*body)();
      } catch (const Aborted&) {
      } catch (...) {
        thrown = std::current_exception();
      }
      thread->state = State::exited;
      thread = thrown || aborting ? nullptr : next_in_warp();
    } while (thread != nullptr && thread->fiber == nullptr);
    idle_fibers.push_back(fiber);
    jump(fiber->place, scheduler);
  }
}

Fiber* make_fiber() {
  Fiber* fiber = new Fiber();
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = fiber->stack.begin();
  fiber->context.uc_stack.ss_size = stack_bytes;
  makecontext(&fiber->context, run_fiber, 0);
  return fiber;
}

__attribute__((noinline)) void enter(Fiber* fiber) {
  if (_setjmp(scheduler) == 0) setcontext(&fiber->context);
}

// Runs the thread until it waits or exits. Afterwards, `running` is the last thread that ran.
void resume(Thread& thread) {
  if (thread.fiber == nullptr) {
    if (idle_fibers.empty()) idle_fibers.push_back(make_fiber());
    thread.fiber = idle_fibers.back();
    idle_fibers.pop_back();
  }
  select(thread);
  if (std::exchange(thread.fiber->entered, true)) {
    jump(scheduler, thread.fiber->place);
  } else {
    enter(thread.fiber);
  }
}

void wait(State state, const char* operation, Site site) {
  Thread& thread = *running;
  thread.state = state;
  thread.operation = operation;
  thread.site = site;
  jump(thread.fiber->place, scheduler);
  if (aborting) throw Aborted{};
}

bool same_place(const Thread& a, const Thread& b) {
  const auto same = [](const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; };
  return a.site.line == b.site.line && same(a.operation, b.operation) &&
         same(a.site.file, b.site.file);
}

bool meet(const Thread& a, const Thread& b) {
  return b.state == State::at_warp_operation && a.mask == b.mask && same_place(a, b);
}

// Completes the warp operation of `last` once all other lanes of its mask have reached it. A mask
// may include lanes that do not exist in the block.
void finish_warp_operation(const Thread& last) {
  unsigned ballot = 0;
  for (auto turn = turns.rbegin(); turn != turns.rend();
       ++turn) {  // the last lane is most likely to be missing
    const int lane = *turn;
    if (lane >= lanes || !(last.mask >> lane & 1)) continue;
    if (!meet(last, warp[lane])) return;
    ballot |= unsigned(warp[lane].bits != 0) << lane;
  }
  const unsigned mask = last.mask;
  for (int lane = 0; lane < lanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    Thread& thread = warp[lane];
    thread.result = thread.source == every_lane ? ballot : warp[thread.source].bits;
    thread.state = State::ready;
  }
}

[[noreturn]] void fail_for_ever_waiting(const Thread& thread) {
  const std::string what = text(thread) + " waits for " + text(thread.operation, thread.site) +
                           " with mask " + hex(thread.mask);
  for (int lane = 0; lane < lanes; ++lane) {
    const Thread& other = warp[lane];
    if (!(thread.mask >> lane & 1) || meet(thread, other)) continue;
    if (other.state == State::exited) fail(what + ", but " + text(other) + " has exited");
    fail(what + ", but " + text(other) + " waits for " + text(other.operation, other.site) +
         (other.state == State::at_warp_operation ? " with mask " + hex(other.mask) : ""));
  }
  fail(what);
}

// Runs the warp's threads until all wait for the block or have exited. Each warp, and each released
// lane, runs as far as possible before the next one, so that orders differ as much as possible.
void run_warp() {
  while (Thread* next = next_in_warp()) {
    resume(*next);
    if (thrown) std::rethrow_exception(thrown);
    if (running->state == State::at_warp_operation) finish_warp_operation(*running);
  }
  for (int lane = 0; lane < lanes; ++lane) {
    if (warp[lane].state == State::at_warp_operation) fail_for_ever_waiting(warp[lane]);
  }
}

// Releases the threads at a barrier. Returns false if all have exited.
bool finish_block_barrier() {
  const Thread* first = nullptr;
  for (Thread& thread : threads) {
    if (thread.state == State::exited) continue;
    if (first == nullptr) first = &thread;
    if (!same_place(*first, thread)) {
      fail(text(*first) + " waits for " + text(first->operation, first->site) + ", but " +
           text(thread) + " for " + text(thread.operation, thread.site));
    }
    thread.state = State::ready;
  }
  return first != nullptr;
}

void run_block(std::size_t shared_bytes) {
  misaligned.clear();
  static const Guarded memory(canary_bytes + shared_limit);
  char* const end = memory.end();
  shared_start = end - (shared_bytes + shared_alignment - 1) / shared_alignment * shared_alignment;
  char* const canaries = shared_start - canary_bytes;
  std::memset(canaries, poison, end - canaries);

  const unsigned count = blockDim.x * blockDim.y * blockDim.z;
  threads.assign(count, Thread{});
  for (unsigned i = 0; i < count; ++i) {
    threads[i].index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
  }
  turns = in_order<int>(warpSize);
  const std::vector<int> warps = in_order<int>((count + warpSize - 1) / warpSize);
  do {
    for (const int i : warps) {
      warp = &threads[i * warpSize];
      lanes = std::min<int>(warpSize, count - i * warpSize);
      run_warp();
    }
  } while (finish_block_barrier());

  if (!misaligned.empty()) fail(misaligned);
  const auto touched = [](char byte) { return static_cast<unsigned char>(byte) != poison; };
  if (std::any_of(canaries, shared_start, touched) ||
      std::any_of(shared_start + shared_bytes, end, touched)) {
    fail("wrote outside of its " + std::to_string(shared_bytes) + " bytes of shared memory");
  }
}

// Unwinds the threads of a failed launch, which still wait inside the kernel.
void unwind() {
  aborting = true;
  for (Thread& thread : threads) {
    if (thread.fiber != nullptr && thread.state != State::exited) resume(thread);
  }
  aborting = false;
  thrown = nullptr;
}

void check_limits(dim3 grid, dim3 block, std::size_t shared_bytes) {
  const auto volume = [](dim3 size) { return std::uint64_t(1) * size.x * size.y * size.z; };
  const auto refuse = [](const std::string& what) {
    throw std::runtime_error("launch refused: " + what);
  };
  const auto between = [](unsigned n, unsigned limit) { return 1 <= n && n <= limit; };
  if (!between(grid.x, 0x7fffffff) || !between(grid.y, 65535) || !between(grid.z, 65535)) {
    refuse("grid " + text(grid.x, grid.y, grid.z) +
           ", accepted are 1 to (2147483647, 65535, 65535)");
  }
  if (!between(block.x, 1024) || !between(block.y, 1024) || !between(block.z, 64) ||
      volume(block) > 1024) {
    refuse("block " + text(block.x, block.y, block.z) + " of " + std::to_string(volume(block)) +
           " threads, accepted are 1 to (1024, 1024, 64) and 1 to 1024 threads");
  }
  if (shared_bytes > shared_limit) {
    refuse(std::to_string(shared_bytes) + " bytes of shared memory, accepted are 0 to " +
           std::to_string(shared_limit));
  }
}

void check_in_kernel(const char* what) {
  if (running == nullptr) throw std::runtime_error(std::string(what) + " outside of a kernel");
}

std::uint64_t warp_operation(const char* operation, unsigned mask, std::uint64_t bits, int source,
                             Site site) {
  const int lane = static_cast<int>(running - warp);
  const auto refuse = [&](const std::string& what) {
    fail(text(*running) + ": " + text(operation, site) + " with mask " + hex(mask) + what);
  };
  if (!(mask >> lane & 1)) refuse(" does not name its own lane " + std::to_string(lane));
  if (source != every_lane && (source >= lanes || !(mask >> source & 1))) {
    refuse(" reads lane " + std::to_string(source) + ", which takes no part");
  }
  Thread& thread = *running;
  thread.mask = mask;
  thread.bits = bits;
  thread.source = source;
  wait(State::at_warp_operation, operation, site);
  return thread.result;
}

}  // namespace

Guarded::Guarded(std::size_t bytes) {
  bytes = (bytes + page - 1) / page * page;
  void* start = mmap(nullptr, page + bytes + page, PROT_NONE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (start == MAP_FAILED) throw std::bad_alloc();
  begin_ = static_cast<char*>(start) + page;
  end_ = begin_ + bytes;
  if (mprotect(begin_, bytes, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
}

Guarded::~Guarded() { munmap(begin_ - page, page + (end_ - begin_) + page); }

void set_launcher(Launcher launcher) { other_launcher = launcher; }
Launcher launcher() { return other_launcher; }

void set_order(std::int64_t order_or_seed) {
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  order = order_or_seed;
}

void* shared_memory() {
  check_in_kernel("shared_memory()");
  return shared_start;
}

void run(dim3 grid, dim3 block, std::size_t shared_bytes, const std::function<void()>& thread) {
  check_limits(grid, block, shared_bytes);
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  body = &thread;
  gridDim = grid;
  blockDim = block;
  random_order.seed(order);
  try {
    for (const auto i : in_order<std::uint64_t>(std::size_t(1) * grid.x * grid.y * grid.z)) {
      const std::uint64_t row = i / grid.x;
      blockIdx = {unsigned(i % grid.x), unsigned(row % grid.y), unsigned(row / grid.y)};
      run_block(shared_bytes);
    }
  } catch (...) {
    unwind();
    running = nullptr;
    throw;
  }
  running = nullptr;
}

void block_barrier(Site site) {
  check_in_kernel("__syncthreads");
  wait(State::at_block_barrier, "__syncthreads", site);
}

void warp_barrier(unsigned mask, Site site) {
  check_in_kernel("__syncwarp");
  warp_operation("__syncwarp", mask, 0, every_lane, site);
}

unsigned ballot(unsigned mask, bool predicate, const char* operation, Site site) {
  check_in_kernel(operation);
  return warp_operation(operation, mask, predicate, every_lane, site);
}

// The source lanes of PTX's shfl instruction: a lane gets its own value if the source is outside of
// its segment of `width` lanes, except that __shfl_xor_sync can read from earlier segments.
std::uint64_t shuffle(Shuffle kind, unsigned mask, std::uint64_t bits, unsigned operand, int width,
                      Site site) {
  static constexpr const char* names[] = {"__shfl_sync", "__shfl_up_sync", "__shfl_down_sync",
                                          "__shfl_xor_sync"};
  const char* operation = names[static_cast<int>(kind)];
  check_in_kernel(operation);
  if (width < 1 || width > warpSize || (width & (width - 1)) != 0) {
    fail(text(*running) + ": " + text(operation, site) + " has width " + std::to_string(width) +
         ", accepted are 1, 2, 4, 8, 16, 32");
  }
  const int lane = static_cast<int>(running - warp), first = lane / width * width;
  const int distance = static_cast<int>(operand & (warpSize - 1));
  int source = lane;
  switch (kind) {
    case Shuffle::any_lane:
      source = first + distance % width;
      break;
    case Shuffle::up:
      if (lane - distance >= first) source = lane - distance;
      break;
    case Shuffle::down:
      if (lane + distance < first + width) source = lane + distance;
      break;
    case Shuffle::exchange:
      if ((lane ^ distance) < first + width) source = lane ^ distance;
      break;
  }
  return warp_operation(operation, mask, bits, source, site);
}

}  // namespace cuda_model

// Called by -fsanitize=alignment before a misaligned access, which is an error on a GPU. It must
// not throw, because the compiler assumes that it does not.
struct Mismatch {
  const char* file;
  unsigned line, column;
  const void* type;
  unsigned char log2_alignment, kind;
};

extern "C" void __ubsan_handle_type_mismatch_v1(Mismatch* what, std::uintptr_t address) {
  using namespace cuda_model;
  if (running == nullptr || !misaligned.empty()) return;
  const int alignment = 1 << what->log2_alignment;
  misaligned = text(*running) + ": " +
               text("an access", {what->file, static_cast<int>(what->line)}) + " needs " +
               std::to_string(alignment) + "-byte alignment, the address is " +
               std::to_string(address % alignment) + " bytes beyond it";
}
