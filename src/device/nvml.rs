//! What NVIDIA's management library says of a GPU, where it is there: it is looked for when it is
//! asked, and nothing depends on it. Knows no metric.

/// What a GPU says of itself, as far as it does.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Reading {
    /// Percent of the last sample period in which a kernel ran.
    pub utilization_percent: Option<u32>,
    /// Bytes in use, and free.
    pub memory: Option<[u64; 2]>,
    /// Power drawn now, in milliwatts.
    pub power_milliwatts: Option<u32>,
    /// Energy drawn since the driver was loaded, in millijoules.
    pub energy_millijoules: Option<u64>,
}

#[cfg(feature = "cuda")]
mod library;

/// Asks a device how it is; takes milliseconds.
pub type Meter = Box<dyn Fn() -> Reading + Send>;

/// Finds a device by its UUID, as `GPU-…` or `MIG-…`.
///
/// # Errors
/// There is no library, or it does not know the device: why.
#[cfg(feature = "cuda")]
pub fn open(uuid: &str) -> Result<Meter, String> {
    library::open(nvml_wrapper::Nvml::builder(), uuid)
}

/// Finds nothing: this program was built without CUDA.
///
/// # Errors
/// Always.
#[cfg(not(feature = "cuda"))]
pub fn open(_uuid: &str) -> Result<Meter, String> {
    Err("this program was built without CUDA".to_owned())
}
