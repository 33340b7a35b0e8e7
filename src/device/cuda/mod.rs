//! A GPU as the rest sees it: memory by address, one stream of work, timers and graphs. Has two
//! implementations: the driver (`driver.rs`), and the emulator of the kernels' tests. Knows no op
//! and no model.

pub mod fault;

#[cfg(feature = "cuda")]
mod driver;

use std::fmt::Debug;
use std::time::Duration;

use fault::GpuError;

/// The oldest driver that knows our kernels' machine code, as the driver counts: CUDA 13.0.
const DRIVER_OLDEST: i32 = 13_000;

/// The oldest chip that the kernels are written for: they copy in the background and multiply bf16.
const CHIP_OLDEST: (u32, u32) = (8, 0);

/// An address in device memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, PartialOrd, Ord, Hash)]
pub struct Address(pub u64);

impl Address {
    /// This many bytes further.
    #[must_use]
    pub fn plus(self, bytes: usize) -> Self {
        Self(self.0 + bytes as u64)
    }
}

/// What a GPU is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct GpuInfo {
    /// As the driver names it.
    pub name: String,
    /// As `GPU-...`, or `MIG-...` for an instance.
    pub uuid: String,
    /// Compute capability.
    pub chip: (u32, u32),
    /// Multiprocessors.
    pub processors: u32,
    /// Bytes of memory.
    pub memory: u64,
}

impl GpuInfo {
    /// Its profile, as `1g.10gb`, if it is an instance of a GPU that is divided (MIG): the driver
    /// says so in its name.
    pub fn mig(&self) -> Option<&str> {
        self.name.split_once(" MIG ").map(|(_, profile)| profile)
    }

    /// Whether the kernels run on it.
    ///
    /// # Errors
    /// It is too old: what is needed, and what it has.
    pub fn check(&self) -> Result<(), GpuError> {
        let ((major, minor), (least, part)) = (self.chip, CHIP_OLDEST);
        if self.chip >= CHIP_OLDEST {
            return Ok(());
        }
        let needed = format!("compute capability {least}.{part} or newer is needed");
        Err(GpuError::outdated(format!("{needed}, {} has {major}.{minor}", self.name)))
    }
}

/// Whether a driver of this version, as it counts, can load the kernels.
///
/// # Errors
/// It is too old: what is needed, and what it is.
pub fn check_driver(version: i32) -> Result<(), GpuError> {
    if version >= DRIVER_OLDEST {
        return Ok(());
    }
    let (major, minor) = (version / 1000, version % 1000 / 10);
    let needed = "a driver for CUDA 13.0 (r580) or newer is needed";
    Err(GpuError::outdated(format!("{needed}, this one is for {major}.{minor}")))
}

/// A kernel that was looked up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KernelId(pub usize);

/// Host memory that copies go through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostId(pub usize);

/// Measures a stretch of work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TimerId(pub usize);

/// Work that was recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GraphId(pub usize);

/// One kernel launch.
#[derive(Debug, Clone, Copy)]
pub struct Launch<'a> {
    /// Which kernel.
    pub kernel: KernelId,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads a block.
    pub threads: u32,
    /// Bytes of shared memory a block.
    pub shared: u32,
    /// The one struct that the kernel takes.
    pub arguments: &'a [u8],
}

/// A GPU, for the one thread that owns it. Work runs in the order in which it is given, and most
/// calls return before it is done.
pub trait Gpu: Debug + Send {
    /// What it is.
    fn info(&self) -> &GpuInfo;

    /// Bytes of memory that nobody uses now.
    ///
    /// # Errors
    /// The device failed.
    fn free_bytes(&mut self) -> Result<u64, GpuError>;

    /// Looks a kernel up, which may use up to `shared` bytes of shared memory a block.
    ///
    /// # Errors
    /// There is no such kernel, or the chip has less shared memory.
    fn kernel(&mut self, name: &str, shared: u32) -> Result<KernelId, GpuError>;

    /// Reserves zeroed memory, aligned to 256 bytes at least. Not for use in a step.
    ///
    /// # Errors
    /// There is not so much.
    fn reserve(&mut self, bytes: usize) -> Result<Address, GpuError>;

    /// Gives memory back, once all work that was given before is done.
    ///
    /// # Errors
    /// The device failed.
    fn release(&mut self, address: Address) -> Result<(), GpuError>;

    /// Copies `bytes` to the device, and waits for it.
    ///
    /// # Errors
    /// The device failed.
    fn upload(&mut self, to: Address, bytes: &[u8]) -> Result<(), GpuError>;

    /// Copies from the device, after all work that was given before, and waits for it.
    ///
    /// # Errors
    /// The device failed.
    fn download(&mut self, from: Address, into: &mut [u8]) -> Result<(), GpuError>;

    /// Host memory that the device copies from and to by itself.
    ///
    /// # Errors
    /// The system refuses it.
    fn host_memory(&mut self, bytes: usize) -> Result<HostId, GpuError>;

    /// That memory; waits until no copy uses it.
    ///
    /// # Errors
    /// The device failed.
    fn host(&mut self, memory: HostId) -> Result<&mut [u8], GpuError>;

    /// Starts to copy the first `bytes` of `from` to the device.
    ///
    /// # Errors
    /// The device failed.
    fn copy_in(&mut self, from: HostId, bytes: usize, to: Address) -> Result<(), GpuError>;

    /// Starts to copy `bytes` from the device to the start of `to`.
    ///
    /// # Errors
    /// The device failed.
    fn copy_out(&mut self, from: Address, to: HostId, bytes: usize) -> Result<(), GpuError>;

    /// Starts a kernel. Its arguments hold addresses: that they are right is the caller's part.
    ///
    /// # Errors
    /// The launch is refused.
    fn launch(&mut self, launch: &Launch<'_>) -> Result<(), GpuError>;

    /// A new timer.
    ///
    /// # Errors
    /// The device failed.
    fn timer(&mut self) -> Result<TimerId, GpuError>;

    /// Starts a timer when the work given so far is done.
    ///
    /// # Errors
    /// The device failed.
    fn start_timer(&mut self, timer: TimerId) -> Result<(), GpuError>;

    /// Stops it when the work given so far is done.
    ///
    /// # Errors
    /// The device failed.
    fn stop_timer(&mut self, timer: TimerId) -> Result<(), GpuError>;

    /// Waits until the timer has stopped, and says what it measured.
    ///
    /// # Errors
    /// The work before it failed, or takes longer than `patience`.
    fn await_timer(&mut self, timer: TimerId, patience: Duration) -> Result<Duration, GpuError>;

    /// From now on launches are recorded, not run.
    ///
    /// # Errors
    /// The device failed.
    fn begin_graph(&mut self) -> Result<(), GpuError>;

    /// What was recorded, ready to run.
    ///
    /// # Errors
    /// Something cannot be recorded.
    fn end_graph(&mut self) -> Result<GraphId, GpuError>;

    /// Runs what was recorded.
    ///
    /// # Errors
    /// The launch is refused.
    fn replay(&mut self, graph: GraphId) -> Result<(), GpuError>;

    /// Forgets what was recorded, once all work that was given before is done.
    ///
    /// # Errors
    /// The device failed.
    fn release_graph(&mut self, graph: GraphId) -> Result<(), GpuError>;
}

/// Opens the GPU that `NVIDIA_VISIBLE_DEVICES` and `CUDA_VISIBLE_DEVICES` show first, with the
/// kernels in `image`.
///
/// # Errors
/// There is none, or this program was built without CUDA.
#[cfg(feature = "cuda")]
pub fn open(image: &'static [u8]) -> Result<Box<dyn Gpu>, GpuError> {
    Ok(Box::new(driver::Driver::open(image)?))
}

/// Opens no GPU: this program was built without CUDA.
///
/// # Errors
/// Always.
#[cfg(not(feature = "cuda"))]
pub fn open(_image: &'static [u8]) -> Result<Box<dyn Gpu>, GpuError> {
    Err(GpuError::absent("this program was built without CUDA"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instance_is_known_by_its_name() {
        let named = |name: &str| GpuInfo { name: name.into(), ..GpuInfo::default() };
        assert_eq!(named("NVIDIA A100-SXM4-80GB MIG 1g.10gb").mig(), Some("1g.10gb"));
        assert_eq!(named("NVIDIA H200").mig(), None);
    }

    #[test]
    fn what_is_too_old_says_what_is_needed() {
        let chip = |chip| GpuInfo { name: "NVIDIA T4".into(), chip, ..GpuInfo::default() };
        for newer in [(8, 0), (8, 6), (9, 0), (12, 1)] {
            assert_eq!(chip(newer).check(), Ok(()));
        }
        let error = chip((7, 5)).check().expect_err("too old");
        assert_eq!(error.fault, fault::Fault::Outdated);
        let told = "open: compute capability 8.0 or newer is needed, NVIDIA T4 has 7.5";
        assert_eq!(error.to_string(), told);
        assert_eq!(check_driver(13_000), Ok(()));
        let error = check_driver(12_040).expect_err("too old").to_string();
        assert!(error.contains("(r580) or newer is needed, this one is for 12.4"), "{error}");
        let build = include_str!("../../../build.rs");
        assert!(build.contains("const CHIPS: &str = \"80,"), "the oldest that is compiled for");
    }
}
