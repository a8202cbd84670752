// SPDX-License-Identifier: Apache-2.0
// An allocator of tensors on the CPU that asks glibc for blocks without an alignment.
//
// PyTorch's own asks for blocks aligned to 64 bytes. glibc takes a larger block for that, cuts off
// what is too much at both ends and gives it to small objects; the hole that is left when the block
// is freed is then too small for another block of the same size. Here the room for the alignment
// stays with the block, and what is freed fits the next tensor of that size.

#include <cstdint>
#include <cstdlib>

#include <c10/core/CPUAllocator.h>

constexpr size_t ALIGNMENT = 64;  // a cache line, as PyTorch's own; malloc's blocks begin at 16s

// Where the block of a tensor's data begins; it lies before the data.
static void*& block_of(void* data) { return ((void**)data)[-1]; }

static void release(void* data) {
  if (!data) return;
  c10::profiledCPUMemoryReporter().Delete(data);
  std::free(block_of(data));
}

struct MallocAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = nullptr;
    if (bytes) {
      void* block = bytes <= PTRDIFF_MAX ? std::malloc(bytes + ALIGNMENT) : nullptr;
      TORCH_CHECK(block, "can't allocate memory: you tried to allocate ", bytes, " bytes");
      data = (void*)(((uintptr_t)block / ALIGNMENT + 1) * ALIGNMENT);
      block_of(data) = block;
      c10::profiledCPUMemoryReporter().New(data, bytes);
    }
    return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

// From here on; what was allocated before knows how it is freed.
extern "C" void malloc_allocator() { c10::SetCPUAllocator(new MallocAllocator); }
