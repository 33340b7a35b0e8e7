//! The device as a piece of hardware: what it is, and what its driver says of it now and then. Kept
//! apart because none of it is known at the start, and some of it never: what nobody knows has no
//! series.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::exposition::write_values;
use super::metrics;
use super::{Setup, Telemetry};

/// What a driver says of the whole device, all its processes together.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct DeviceReading {
    /// Share of the last moments in which it computed at all, 0..=1.
    pub utilization: Option<f64>,
    /// Bytes of memory in use, and free.
    pub memory: Option<[u64; 2]>,
    /// Power drawn now.
    pub power_watts: Option<f64>,
    /// Energy drawn since its driver was loaded.
    pub energy_joules: Option<f64>,
}

/// Of a family that is one number.
const NO_LABELS: &[&str] = &[];

/// What is known.
#[derive(Debug)]
pub(super) struct Board(Mutex<Known>);

#[derive(Debug)]
struct Known {
    /// Name, UUID, MIG profile.
    device: [String; 3],
    reading: DeviceReading,
}

impl Board {
    pub(super) fn new(setup: &Setup) -> Self {
        let Setup { device_name, device_uuid, device_mig, .. } = setup;
        let device = [device_name, device_uuid, device_mig].map(String::clone);
        Self(Mutex::new(Known { device, reading: DeviceReading::default() }))
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        // Whole after every statement.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Telemetry {
    /// This device computes; `mig` is its profile if it is part of one, else empty.
    pub fn device_opened(&self, name: &str, uuid: &str, mig: &str) {
        self.board.known().device = [name, uuid, mig].map(str::to_owned);
    }

    /// Its driver said this. Once it said something it has to say it again, or the series ends.
    pub fn device_read(&self, reading: DeviceReading) {
        self.board.known().reading = reading;
    }

    /// Appends what is known.
    pub(super) fn write_board(&self, page: &mut String) {
        let known = self.board.known();
        let device = known.device.each_ref().map(String::as_str);
        write_values(page, &metrics::DEVICE, [(&device[..], 1.0)]);
        let DeviceReading { utilization, memory, power_watts, energy_joules } = known.reading;
        let one = |value: Option<f64>| value.map(|value| (NO_LABELS, value));
        write_values(page, &metrics::UTILIZATION, one(utilization));
        let memory = memory.iter().flat_map(|bytes| metrics::HELD.iter().zip(bytes));
        let memory: Vec<_> = memory.map(|(state, bytes)| ([*state], *bytes as f64)).collect();
        let memory = memory.iter().map(|(labels, bytes)| (&labels[..], *bytes));
        write_values(page, &metrics::BOARD_MEMORY, memory);
        write_values(page, &metrics::POWER, one(power_watts));
        write_values(page, &metrics::ENERGY, one(energy_joules));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_known_has_series() {
        let setup = Setup { device_name: "cpu".into(), ..Setup::default() };
        let telemetry = Telemetry::new(setup);
        let page = telemetry.render();
        assert!(page.contains("sconce_device_info{name=\"cpu\",uuid=\"\",mig=\"\"} 1\n"), "{page}");
        let hardware = ["utilization_ratio", "board_memory", "power_watts", "energy_joules"];
        for name in hardware {
            assert!(!page.contains(name), "{name}");
        }
        telemetry.device_opened("A \"GPU\"", "GPU-1", "");
        telemetry.device_read(DeviceReading {
            utilization: Some(0.25),
            memory: Some([3, 5]),
            power_watts: Some(71.5),
            energy_joules: Some(1e9),
        });
        let page = telemetry.render();
        for line in [
            "sconce_device_info{name=\"A \\\"GPU\\\"\",uuid=\"GPU-1\",mig=\"\"} 1\n",
            "# TYPE sconce_device_utilization_ratio gauge\nsconce_device_utilization_ratio 0.25\n",
            "sconce_device_board_memory_bytes{state=\"used\"} 3\n",
            "sconce_device_board_memory_bytes{state=\"free\"} 5\n",
            "sconce_device_power_watts 71.5\n",
            "# TYPE sconce_device_energy_joules_total counter\n",
            "sconce_device_energy_joules_total 1000000000\n",
        ] {
            assert!(page.contains(line), "{line}{page}");
        }
        assert!(!page.contains("name=\"cpu\""));
        // A MIG instance has memory of its own, and no meters.
        telemetry.device_read(DeviceReading { memory: Some([1, 1]), ..Default::default() });
        let page = telemetry.render();
        assert!(page.contains("board_memory") && !page.contains("power_watts"));
    }
}
