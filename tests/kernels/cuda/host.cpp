// Runs kernels that come in on standard input, and gives their arrays back on standard output.
//
// A launch: the name's length and bytes; grid x and y, threads, order (1: threads and blocks in falling order),
// number of arguments, all u32; then each argument's size (u64) and bytes. The answer: the bytes of each array.

#include <map>
#include <memory>
#include <ucontext.h>
#include <unistd.h>

#include "cuda_on_host.h"

// Only one thread runs at a time.
dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace {

constexpr size_t STACK = 256 * 1024;
constexpr unsigned WARP_LANES = 32;

[[noreturn]] void fail(const std::string& why) {
    std::fprintf(stderr, "%s\n", why.c_str());
    std::exit(3);
}

struct Barrier {
    unsigned arrived = 0, generation = 0;
};
// Where a fiber or the scheduler stands. The compiler's own jumps change nothing but the registers; swapcontext
// would ask the kernel for the signal mask each time.
struct Place {
    void* buffer[5];
};
struct Fiber {
    std::vector<char> stack = std::vector<char>(STACK);
    ucontext_t context;
    Place place;
    unsigned thread = 0, exchanges = 0;
    const Barrier* waits_for = nullptr;
    unsigned generation = 0;
    bool started = false, done = false;
};

std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Barrier> warps;
std::vector<uint64_t> slots;  // two a lane, used in turn
Barrier block;
Place scheduler;
Fiber* current = nullptr;
std::function<void()> body;

// `noipa`: a caller must not count on registers that these functions, looked at by themselves, leave alone.
[[gnu::noipa, noreturn]] void jump_to(Place& place) { __builtin_longjmp(place.buffer, 1); }

[[gnu::noipa]] void back_to_scheduler() {
    if (__builtin_setjmp(current->place.buffer) == 0) jump_to(scheduler);
}

[[noreturn]] void enter() {
    for (;;) {
        body();
        current->done = true;
        back_to_scheduler();
    }
}

[[gnu::noipa]] void resume(Fiber& fiber) {
    current = &fiber;
    threadIdx.x = fiber.thread;
    if (__builtin_setjmp(scheduler.buffer) == 0) {
        if (fiber.started) jump_to(fiber.place);
        fiber.started = true;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = STACK;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, enter, 0);
        setcontext(&fiber.context);
    }
}

void wait(Barrier& barrier, unsigned size) {
    Fiber* self = current;
    if (++barrier.arrived == size) {
        barrier.arrived = 0;
        barrier.generation++;
        return;
    }
    self->waits_for = &barrier;
    self->generation = barrier.generation;
    back_to_scheduler();
}

void run_block(unsigned threads, bool falling) {
    if (threads % WARP_LANES) fail("a block is not a whole number of warps");
    while (fibers.size() < threads) fibers.push_back(std::make_unique<Fiber>());
    warps.assign(threads / WARP_LANES, {});
    slots.assign(2 * threads, 0);
    block = {};
    for (unsigned t = 0; t < threads; t++) {
        Fiber& fiber = *fibers[t];
        fiber.thread = t;
        fiber.exchanges = 0;
        fiber.waits_for = nullptr;
        fiber.done = false;
    }
    for (unsigned done = 0; done < threads;) {
        bool progress = false;
        for (unsigned i = 0; i < threads; i++) {
            Fiber& fiber = *fibers[falling ? threads - 1 - i : i];
            if (fiber.done || (fiber.waits_for && fiber.waits_for->generation == fiber.generation)) continue;
            fiber.waits_for = nullptr;
            progress = true;
            resume(fiber);
            done += fiber.done;
        }
        if (!progress) fail("threads wait at a barrier that the others do not reach");
    }
}

struct Entry {
    std::vector<bool> arrays;
    Call call;
};
std::map<std::string, Entry>& kernels() {
    static std::map<std::string, Entry> all;
    return all;
}

bool read_all(void* into, size_t size) {
    char* at = static_cast<char*>(into);
    while (size) {
        const ssize_t got = read(0, at, size);
        if (got <= 0) return false;
        at += got;
        size -= static_cast<size_t>(got);
    }
    return true;
}
template <class T>
T read_one() {
    T value;
    if (!read_all(&value, sizeof value)) fail("a launch is cut short");
    return value;
}

}  // namespace

void wait_for_block() { wait(block, blockDim.x); }

const uint64_t* exchange(unsigned mask, uint64_t value) {
    if (mask != 0xFFFFFFFFu) fail("a shuffle of part of a warp");
    Fiber& self = *current;
    const unsigned warp = self.thread / WARP_LANES;
    uint64_t* row = slots.data() + (2 * warp + self.exchanges++ % 2) * WARP_LANES;
    row[self.thread % WARP_LANES] = value;
    wait(warps[warp], WARP_LANES);
    return row;
}

void add_kernel(const char* name, std::vector<bool> arrays, Call call) { kernels()[name] = {std::move(arrays), std::move(call)}; }

int main() {
    for (uint32_t length; read_all(&length, sizeof length);) {
        std::string name(length, ' ');
        read_all(name.data(), length);
        gridDim = {read_one<uint32_t>(), read_one<uint32_t>(), 1};
        blockDim = {read_one<uint32_t>(), 1, 1};
        const bool falling = read_one<uint32_t>();
        const uint32_t count = read_one<uint32_t>();
        const auto found = kernels().find(name);
        if (found == kernels().end()) fail("no kernel " + name);
        if (found->second.arrays.size() != count) fail(name + " takes another number of arguments");
        // Each array by itself, so that the sanitizer sees its ends.
        std::vector<std::unique_ptr<char[]>> bytes;
        std::vector<size_t> sizes;
        std::vector<char*> pointers(count), arguments(count);
        for (uint32_t i = 0; i < count; i++) {
            sizes.push_back(read_one<uint64_t>());
            bytes.emplace_back(new char[sizes[i]]);
            if (!read_all(bytes[i].get(), sizes[i])) fail("an argument is cut short");
            pointers[i] = bytes[i].get();
            arguments[i] = found->second.arrays[i] ? reinterpret_cast<char*>(&pointers[i]) : pointers[i];
        }
        body = [&] { found->second.call(arguments.data()); };
        const unsigned blocks = gridDim.x * gridDim.y;
        for (unsigned i = 0; i < blocks; i++) {
            const unsigned at = falling ? blocks - 1 - i : i;
            blockIdx = {at % gridDim.x, at / gridDim.x, 0};
            run_block(blockDim.x, falling);
        }
        for (uint32_t i = 0; i < count; i++)
            if (found->second.arrays[i]) std::fwrite(bytes[i].get(), 1, sizes[i], stdout);
        std::fflush(stdout);
    }
}
