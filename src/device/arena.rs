//! Raw device memory on a CPU: page-aligned, zeroed regions, reserved once and handed to kernels
//! as bytes. Knows neither what lies in them nor who uses which part.

#![allow(unsafe_code)]

use std::io;
use std::ptr::NonNull;

/// Every region starts at a multiple of this.
pub const REGION_ALIGN: usize = 4096;

/// A fixed block of zeroed memory, at least 4 KiB aligned: the KV region of a device, the
/// workspace of a model, the panels of a weight matrix. Pages are committed when first touched.
#[derive(Debug)]
pub struct Region {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: a region owns its memory alone, as a `Box<[u8]>` would.
unsafe impl Send for Region {}
// SAFETY: shared references give shared access to bytes only.
unsafe impl Sync for Region {}

impl Region {
    /// Reserves `bytes` of zeroed memory, backed by huge pages where the system has them.
    ///
    /// # Errors
    /// The system refuses the reservation.
    pub fn new(bytes: usize) -> io::Result<Self> {
        if bytes == 0 {
            return Ok(Self { start: NonNull::<Page>::dangling().cast(), bytes });
        }
        let start = map(bytes)?;
        let start = NonNull::new(start.cast()).expect("a mapping is never at address zero");
        Ok(Self { start, bytes })
    }

    /// Size in bytes.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// All of it.
    pub fn as_bytes(&self) -> &[u8] {
        // SAFETY: the mapping is `bytes` long, zeroed at birth and lives as long as `self`.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.bytes) }
    }

    /// All of it, for writing.
    pub fn as_bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.bytes) }
    }

    /// `count` f32 values from byte `offset` on.
    ///
    /// # Panics
    /// If `offset` is not a multiple of 4, or the range leaves the region.
    pub fn floats(&self, offset: usize, count: usize) -> &[f32] {
        let start = &self.as_bytes()[offset..offset + count * size_of::<f32>()];
        assert!(start.as_ptr().cast::<f32>().is_aligned(), "f32 values start at multiples of 4");
        // SAFETY: in range and aligned as checked; every bit pattern is an f32.
        unsafe { std::slice::from_raw_parts(start.as_ptr().cast(), count) }
    }

    /// As [`Region::floats`], for writing.
    ///
    /// # Panics
    /// As [`Region::floats`].
    pub fn floats_mut(&mut self, offset: usize, count: usize) -> &mut [f32] {
        let start = &mut self.as_bytes_mut()[offset..offset + count * size_of::<f32>()];
        assert!(start.as_ptr().cast::<f32>().is_aligned(), "f32 values start at multiples of 4");
        // SAFETY: in range and aligned as checked; every bit pattern is an f32.
        unsafe { std::slice::from_raw_parts_mut(start.as_mut_ptr().cast(), count) }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        if self.bytes > 0 {
            // SAFETY: exactly the range that `new` mapped; nothing borrows it any more.
            unsafe { unmap(self.start.as_ptr().cast(), self.bytes) };
        }
    }
}

/// `bytes` of zeroed memory.
#[cfg(not(sconce_heap))]
fn map(bytes: usize) -> io::Result<*mut libc::c_void> {
    // SAFETY: an anonymous private mapping at an address of the system's choice touches no
    // existing memory.
    let start = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    #[cfg(target_os = "linux")]
    if bytes >= HUGE_PAGE {
        // SAFETY: the range was mapped just now; advice changes no contents, and its failure
        // (no huge pages on this system) costs speed only.
        unsafe { libc::madvise(start, bytes, libc::MADV_HUGEPAGE) };
    }
    Ok(start)
}

/// # Safety
/// [`map`] gave just this, and nobody uses it.
#[cfg(not(sconce_heap))]
unsafe fn unmap(start: *mut libc::c_void, bytes: usize) {
    // SAFETY: as promised.
    unsafe { libc::munmap(start, bytes) };
}

#[cfg(sconce_heap)]
fn map(bytes: usize) -> io::Result<*mut libc::c_void> {
    let layout = heap_layout(bytes);
    // SAFETY: no region that asks is empty.
    let start = unsafe { std::alloc::alloc_zeroed(layout) };
    if start.is_null() { Err(io::ErrorKind::OutOfMemory.into()) } else { Ok(start.cast()) }
}

#[cfg(sconce_heap)]
unsafe fn unmap(start: *mut libc::c_void, bytes: usize) {
    // SAFETY: as promised.
    unsafe { std::alloc::dealloc(start.cast(), heap_layout(bytes)) };
}

#[cfg(sconce_heap)]
fn heap_layout(bytes: usize) -> std::alloc::Layout {
    std::alloc::Layout::from_size_align(bytes, REGION_ALIGN).expect("a region is no half of memory")
}

/// What an empty region points at: an aligned address of nothing.
#[repr(align(4096))]
struct Page;

#[cfg(target_os = "linux")]
const HUGE_PAGE: usize = 2 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_are_aligned_zeroed_and_writable() {
        for bytes in [1, 4096, 5 << 20] {
            let mut region = Region::new(bytes).unwrap();
            assert_eq!(region.as_bytes().as_ptr() as usize % REGION_ALIGN, 0);
            assert_eq!(region.len(), bytes);
            assert!(region.as_bytes().iter().all(|&b| b == 0));
            region.as_bytes_mut()[bytes - 1] = 7;
            assert_eq!(region.as_bytes()[bytes - 1], 7);
        }
    }

    #[test]
    fn an_empty_region_has_no_bytes() {
        let region = Region::new(0).unwrap();
        assert!(region.is_empty());
        assert_eq!(region.as_bytes(), &[] as &[u8]);
        assert_eq!(region.floats(0, 0), &[] as &[f32]);
    }

    #[test]
    fn views_are_checked() {
        let mut region = Region::new(64).unwrap();
        region.floats_mut(16, 2).copy_from_slice(&[1.0, 2.0]);
        assert_eq!(region.floats(20, 1), &[2.0]);
        assert!(std::panic::catch_unwind(|| region.floats(2, 1).len()).is_err());
        assert!(std::panic::catch_unwind(|| region.floats(60, 2).len()).is_err());
    }
}
