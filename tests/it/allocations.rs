//! Steps in a steady state ask the system for no memory, counted by the test's own allocator.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use sconce::kernels::cpu::isa::SetKind;

use crate::models::{Bench, ENCODER, GENERATOR};

thread_local! {
    /// Allocations of this thread.
    static COUNT: Cell<usize> = const { Cell::new(0) };
}

struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn count() {
    // A thread that is ending has no count any more.
    let _ = COUNT.try_with(|count| count.set(count.get() + 1));
}

// SAFETY: all is done by the system's allocator.
#[allow(unsafe_code, reason = "an allocator is")]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: as the caller promises.
        unsafe { System.realloc(memory, layout, size) }
    }
}

/// How often `work` allocates on this thread.
pub(crate) fn allocations(work: impl FnOnce()) -> usize {
    let before = COUNT.get();
    work();
    COUNT.get() - before
}

#[test]
fn the_count_counts() {
    assert_eq!(allocations(|| drop(std::hint::black_box(vec![1u8; 100]))), 1);
    assert_eq!(allocations(|| _ = std::hint::black_box([1u8; 100])), 0);
}

/// One thread, so that all of it is this one's.
#[test]
fn steps_of_a_generator_allocate_nothing() {
    let mut bench = Bench::new(GENERATOR, SetKind::detect(), 1);
    for home in 0..4 {
        bench.add(home, 0, &[1, 2, 3, 4, 5]);
    }
    bench.run();
    let mut seen = Vec::new();
    for at in 5..13 {
        for home in 0..4 {
            bench.add(home, at, &[at as u32]);
        }
        seen.push(allocations(|| bench.go()));
        bench.clear();
    }
    assert_eq!(seen[2..], [0; 6], "{seen:?}");
}

/// A vector is the answer itself, and handed over; nothing else is allocated.
#[test]
fn steps_of_an_encoder_allocate_their_answers_only() {
    let mut bench = Bench::new(ENCODER, SetKind::detect(), 1);
    let mut seen = Vec::new();
    for _ in 0..4 {
        for _ in 0..3 {
            bench.add(0, 0, &[101, 2003, 102]);
        }
        seen.push(allocations(|| bench.go()));
        bench.clear();
    }
    assert_eq!(seen[2..], [3; 2], "{seen:?}");
}
