//! What a failed CUDA call means. A sticky error poisons the context: every later call in the
//! process fails as well, so the process must end. Knows no driver: results are numbers.

/// A CUDA call that failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{call}: {name}{}", in_brackets(*.code))]
pub struct GpuError {
    /// What was called.
    pub call: &'static str,
    /// The driver's number; 0 where it was not asked.
    pub code: u32,
    /// The driver's word for it.
    pub name: String,
    /// What it means.
    pub fault: Fault,
}

/// What kind of failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// There is no usable GPU.
    Absent,
    /// There is one, and its driver or the chip itself is too old for the kernels.
    Outdated,
    /// There is not enough memory; nothing else is wrong.
    Memory,
    /// This call was wrong; the device goes on.
    Call,
    /// A kernel left its memory.
    IllegalAddress,
    /// A kernel was ended by the device: misaligned, undefined instruction, assertion, trap.
    Kernel,
    /// A kernel runs longer than allowed, or work never ends.
    Hung,
    /// Memory lost its contents.
    Ecc,
    /// The device or the driver is gone.
    Device,
}

impl Fault {
    /// Every kind of failure.
    pub const ALL: [Fault; 9] = [
        Fault::Absent,
        Fault::Outdated,
        Fault::Memory,
        Fault::Call,
        Fault::IllegalAddress,
        Fault::Kernel,
        Fault::Hung,
        Fault::Ecc,
        Fault::Device,
    ];

    /// Whether the context is lost: every later call fails, until the process starts anew.
    pub fn is_sticky(self) -> bool {
        match self {
            Fault::Absent | Fault::Outdated | Fault::Memory | Fault::Call => false,
            Fault::IllegalAddress | Fault::Kernel | Fault::Hung | Fault::Ecc | Fault::Device => {
                true
            }
        }
    }

    /// As a metric label.
    pub fn as_str(self) -> &'static str {
        match self {
            Fault::Absent => "absent",
            Fault::Outdated => "outdated",
            Fault::Memory => "memory",
            Fault::Call => "call",
            Fault::IllegalAddress => "illegal_address",
            Fault::Kernel => "kernel",
            Fault::Hung => "hung",
            Fault::Ecc => "ecc",
            Fault::Device => "device",
        }
    }

    /// By the driver's number (`CUresult`, CUDA 13.0).
    pub fn of(code: u32) -> Self {
        match code {
            2 => Fault::Memory,
            // No device, one in exclusive use, a driver that is missing or not ready.
            3 | 34 | 46 | 100..=102 | 802 | 807..=809 => Fault::Absent,
            // Driver and library of different releases, or a library that is too new for the chip.
            803 | 804 => Fault::Outdated,
            214 | 226 => Fault::Ecc,
            700 => Fault::IllegalAddress,
            702 | 909 => Fault::Hung,
            710 | 714..=719 | 721 => Fault::Kernel,
            // Driver shut down, context destroyed, NVLink, MPS server gone, external device.
            4 | 201 | 220 | 709 | 805 | 806 | 810 | 911 | 999 => Fault::Device,
            _ => Fault::Call,
        }
    }
}

impl GpuError {
    /// By the driver's number and word.
    pub fn new(call: &'static str, code: u32, name: impl Into<String>) -> Self {
        Self { call, code, name: name.into(), fault: Fault::of(code) }
    }

    /// There is no GPU to use.
    pub fn absent(name: impl Into<String>) -> Self {
        Self { call: "open", code: 0, name: name.into(), fault: Fault::Absent }
    }

    /// There is a GPU, and its driver or the chip is too old.
    pub fn outdated(name: impl Into<String>) -> Self {
        Self { fault: Fault::Outdated, ..Self::absent(name) }
    }

    /// A request that the device cannot serve, found before the driver was asked.
    pub fn refused(call: &'static str, name: impl Into<String>) -> Self {
        Self { call, code: 0, name: name.into(), fault: Fault::Call }
    }

    /// Work that does not end.
    pub fn hung(call: &'static str) -> Self {
        Self { call, code: 0, name: "the device does not finish".into(), fault: Fault::Hung }
    }
}

/// The driver's number, where there is one.
fn in_brackets(code: u32) -> String {
    if code == 0 { String::new() } else { format!(" ({code})") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_poisons_the_context_is_sticky() {
        // As the driver's header numbers them.
        let sticky = [
            (700, Fault::IllegalAddress),
            (702, Fault::Hung),
            (710, Fault::Kernel),
            (714, Fault::Kernel),
            (715, Fault::Kernel),
            (716, Fault::Kernel),
            (717, Fault::Kernel),
            (718, Fault::Kernel),
            (719, Fault::Kernel),
            (214, Fault::Ecc),
            (999, Fault::Device),
        ];
        for (code, fault) in sticky {
            assert_eq!(Fault::of(code), fault, "{code}");
            assert!(fault.is_sticky(), "{code}");
        }
        for code in [1, 2, 100, 209, 222, 400, 500, 600, 701, 801, 900] {
            assert!(!Fault::of(code).is_sticky(), "{code}");
        }
    }

    #[test]
    fn labels_are_distinct() {
        let mut labels: Vec<_> = Fault::ALL.iter().map(|fault| fault.as_str()).collect();
        labels.sort_unstable();
        labels.dedup();
        assert_eq!(labels.len(), Fault::ALL.len());
    }
}
