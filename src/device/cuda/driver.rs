//! The GPU by its driver, which is looked for when the program starts: a machine without one runs
//! the same binary. One stream of our own; memory, pinned buffers, events and graphs by their
//! plain handles, so that nothing waits or allocates behind our back.

#![allow(unsafe_code)]

use std::ffi::{CStr, CString, c_void};
use std::ptr::null_mut;
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use cudarc::driver::sys;

use super::fault::GpuError;
use super::{Address, Gpu, GpuInfo, GraphId, HostId, KernelId, Launch, TimerId};

/// How long a wait looks at the event without pause, and how long it sleeps afterwards.
const LOOK: Duration = Duration::from_micros(200);
const NAP: Duration = Duration::from_micros(20);

/// The first architecture, as PTX counts, whose kernels wait for each other (`begin` in
/// `intrinsics.cuh`).
const OVERLAP_OLDEST: i32 = 90;

/// Shared memory that every kernel may use without asking.
const SHARED_FREE: u32 = 48 << 10;

/// A GPU.
#[derive(Debug)]
pub(super) struct Driver {
    info: GpuInfo,
    device: sys::CUdevice,
    context: sys::CUcontext,
    module: sys::CUmodule,
    stream: sys::CUstream,
    /// The thread that the context is current in.
    bound: Option<ThreadId>,
    memory: Vec<Address>,
    kernels: Vec<Kernel>,
    host: Vec<Pinned>,
    timers: Vec<[sys::CUevent; 2]>,
    graphs: Vec<sys::CUgraphExec>,
}

/// A kernel of the module.
#[derive(Debug)]
struct Kernel {
    name: String,
    function: sys::CUfunction,
    /// It waits for the one before it by itself, and may be begun while that one still runs.
    overlaps: bool,
}

/// Page-locked memory, cached by the processor.
#[derive(Debug)]
struct Pinned {
    start: *mut u8,
    bytes: usize,
    /// Recorded after each copy.
    done: sys::CUevent,
}

// SAFETY: handles of the driver may be used from any thread, one at a time; `bind` makes the
// context current in the thread that calls.
unsafe impl Send for Driver {}

/// The driver's answer as ours.
fn check(call: &'static str, result: sys::CUresult) -> Result<(), GpuError> {
    let code = result as u32;
    if code == 0 {
        return Ok(());
    }
    let mut name = std::ptr::null();
    // SAFETY: the driver writes a pointer to a constant, or leaves it null.
    let known = unsafe { sys::cuGetErrorName(result, &raw mut name) };
    let name = if known as u32 == 0 && !name.is_null() {
        // SAFETY: a string constant of the driver.
        unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
    } else {
        "unknown".to_owned()
    };
    Err(GpuError::new(call, code, name))
}

impl Driver {
    /// Opens the first visible GPU and loads the kernels in `image`, a fat binary.
    pub(super) fn open(image: &'static [u8]) -> Result<Self, GpuError> {
        // SAFETY: loading a library runs its constructors; the driver's are meant to be run.
        if !unsafe { sys::is_culib_present() } {
            return Err(GpuError::absent("there is no NVIDIA driver on this machine"));
        }
        let mut version = 0;
        // SAFETY: both calls are valid at any time, and write one number.
        unsafe {
            check("cuDriverGetVersion", sys::cuDriverGetVersion(&raw mut version))?;
            super::check_driver(version)?;
            check("cuInit", sys::cuInit(0))?;
        }
        let mut device = 0;
        // SAFETY: the driver is initialised, and writes one number.
        check("cuDeviceGet", unsafe { sys::cuDeviceGet(&raw mut device, 0) })?;
        let info = describe(device)?;
        info.check()?;
        let mut this = Self {
            info,
            device,
            context: null_mut(),
            module: null_mut(),
            stream: null_mut(),
            bound: None,
            memory: Vec::new(),
            kernels: Vec::new(),
            host: Vec::new(),
            timers: Vec::new(),
            graphs: Vec::new(),
        };
        this.start(image)?;
        Ok(this)
    }

    fn start(&mut self, image: &'static [u8]) -> Result<(), GpuError> {
        // SAFETY: each call writes the handle that it is given a place for. The image is a whole
        // fat binary, made by the build.
        unsafe {
            let retained = sys::cuDevicePrimaryCtxRetain(&raw mut self.context, self.device);
            check("cuDevicePrimaryCtxRetain", retained)?;
            self.bind()?;
            let loaded = sys::cuModuleLoadData(&raw mut self.module, image.as_ptr().cast());
            check("cuModuleLoadData", loaded)?;
            // Not in step with the legacy default stream, which nobody here uses.
            check("cuStreamCreate", sys::cuStreamCreate(&raw mut self.stream, 1))
        }
    }

    /// Makes the context current in this thread.
    fn bind(&mut self) -> Result<(), GpuError> {
        let thread = std::thread::current().id();
        if self.bound != Some(thread) {
            // SAFETY: the context is ours and open.
            check("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.context) })?;
            self.bound = Some(thread);
        }
        Ok(())
    }

    /// Waits until all work is done.
    fn synchronize(&self) -> Result<(), GpuError> {
        // SAFETY: the stream is ours and open.
        check("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(self.stream) })
    }

    fn event(&mut self, flags: u32) -> Result<sys::CUevent, GpuError> {
        let mut event = null_mut();
        // SAFETY: the driver writes a handle.
        check("cuEventCreate", unsafe { sys::cuEventCreate(&raw mut event, flags) })?;
        Ok(event)
    }

    fn record(&self, event: sys::CUevent) -> Result<(), GpuError> {
        // SAFETY: event and stream are ours and open.
        check("cuEventRecord", unsafe { sys::cuEventRecord(event, self.stream) })
    }
}

/// Waits for an event, at most so long.
fn wait(event: sys::CUevent, patience: Duration) -> Result<(), GpuError> {
    let started = Instant::now();
    loop {
        // SAFETY: the event is open.
        let result = unsafe { sys::cuEventQuery(event) };
        if result != sys::CUresult::CUDA_ERROR_NOT_READY {
            return check("cuEventQuery", result);
        }
        let waited = started.elapsed();
        if waited > patience {
            return Err(GpuError::hung("cuEventQuery"));
        }
        if waited > LOOK {
            std::thread::sleep(NAP);
        } else {
            std::hint::spin_loop();
        }
    }
}

fn describe(device: sys::CUdevice) -> Result<GpuInfo, GpuError> {
    use sys::CUdevice_attribute_enum as Attribute;
    let attribute = |of| -> Result<u32, GpuError> {
        let mut value = 0;
        // SAFETY: the driver writes one number.
        let asked = unsafe { sys::cuDeviceGetAttribute(&raw mut value, of, device) };
        check("cuDeviceGetAttribute", asked)?;
        Ok(value as u32)
    };
    let mut name = [0; 128];
    let mut uuid = sys::CUuuid { bytes: [0; 16] };
    let mut memory = 0;
    // SAFETY: the driver writes at most as many bytes as it is told, 16 bytes, and a number.
    unsafe {
        let asked = sys::cuDeviceGetName(name.as_mut_ptr(), name.len() as i32, device);
        check("cuDeviceGetName", asked)?;
        check("cuDeviceGetUuid", sys::cuDeviceGetUuid_v2(&raw mut uuid, device))?;
        check("cuDeviceTotalMem", sys::cuDeviceTotalMem_v2(&raw mut memory, device))?;
    }
    let letters = name.iter().take_while(|c| **c != 0).map(|c| *c as u8).collect();
    let digits: Vec<String> = uuid.bytes.iter().map(|b| format!("{:02x}", *b as u8)).collect();
    let part = |range: std::ops::Range<usize>| digits[range].concat();
    let parts = [part(0..4), part(4..6), part(6..8), part(8..10), part(10..16)];
    let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    let mut info = GpuInfo {
        name: String::from_utf8(letters).unwrap_or_else(|_| "unnamed".into()),
        uuid: String::new(),
        chip: (major, minor),
        processors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        memory: memory as u64,
    };
    // Of an instance, all of this is the instance's own.
    let kind = if info.mig().is_some() { "MIG" } else { "GPU" };
    info.uuid = format!("{kind}-{}", parts.join("-"));
    Ok(info)
}

impl Gpu for Driver {
    fn info(&self) -> &GpuInfo {
        &self.info
    }

    fn free_bytes(&mut self) -> Result<u64, GpuError> {
        self.bind()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: the driver writes two numbers.
        check("cuMemGetInfo", unsafe { sys::cuMemGetInfo_v2(&raw mut free, &raw mut total) })?;
        Ok(free as u64)
    }

    fn kernel(&mut self, name: &str, shared: u32) -> Result<KernelId, GpuError> {
        self.bind()?;
        if let Some(index) = self.kernels.iter().position(|known| known.name == name) {
            return Ok(KernelId(index));
        }
        let symbol = CString::new(name)
            .map_err(|_| GpuError::refused("cuModuleGetFunction", "a name with a zero"))?;
        let mut function = null_mut();
        // SAFETY: the module is loaded, the name ends in zero, the driver writes a handle.
        let found =
            unsafe { sys::cuModuleGetFunction(&raw mut function, self.module, symbol.as_ptr()) };
        check("cuModuleGetFunction", found)?;
        if shared > SHARED_FREE {
            let attribute =
                sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function was found just now.
            let set = unsafe { sys::cuFuncSetAttribute(function, attribute, shared as i32) };
            check("cuFuncSetAttribute", set)?;
        }
        // Of what the code was compiled from, not of the chip: it may be PTX of an older one.
        let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_PTX_VERSION;
        let mut version = 0;
        // SAFETY: the function was found just now; the driver writes one number.
        let asked = unsafe { sys::cuFuncGetAttribute(&raw mut version, attribute, function) };
        check("cuFuncGetAttribute", asked)?;
        let overlaps = version >= OVERLAP_OLDEST;
        self.kernels.push(Kernel { name: name.to_owned(), function, overlaps });
        Ok(KernelId(self.kernels.len() - 1))
    }

    fn reserve(&mut self, bytes: usize) -> Result<Address, GpuError> {
        self.bind()?;
        let mut address = 0;
        // SAFETY: the driver writes an address, and zeroes what it has just given.
        unsafe {
            check("cuMemAlloc", sys::cuMemAlloc_v2(&raw mut address, bytes.max(1)))?;
            self.memory.push(Address(address));
            let zeroed = sys::cuMemsetD8Async(address, 0, bytes.max(1), self.stream);
            check("cuMemsetD8Async", zeroed)?;
        }
        Ok(Address(address))
    }

    fn release(&mut self, address: Address) -> Result<(), GpuError> {
        self.bind()?;
        self.synchronize()?;
        let index = self.memory.iter().position(|known| *known == address);
        let index = index.ok_or_else(|| GpuError::refused("cuMemFree", "not reserved"))?;
        self.memory.swap_remove(index);
        // SAFETY: it was reserved, and no work that could use it is left.
        check("cuMemFree", unsafe { sys::cuMemFree_v2(address.0) })
    }

    fn upload(&mut self, to: Address, bytes: &[u8]) -> Result<(), GpuError> {
        self.bind()?;
        // SAFETY: the source outlives the copy, for it is waited for.
        unsafe {
            let source = bytes.as_ptr().cast();
            let copied = sys::cuMemcpyHtoDAsync_v2(to.0, source, bytes.len(), self.stream);
            check("cuMemcpyHtoDAsync", copied)?;
        }
        self.synchronize()
    }

    fn download(&mut self, from: Address, into: &mut [u8]) -> Result<(), GpuError> {
        self.bind()?;
        // SAFETY: the target outlives the copy, for it is waited for.
        unsafe {
            let target = into.as_mut_ptr().cast();
            let copied = sys::cuMemcpyDtoHAsync_v2(target, from.0, into.len(), self.stream);
            check("cuMemcpyDtoHAsync", copied)?;
        }
        self.synchronize()
    }

    fn host_memory(&mut self, bytes: usize) -> Result<HostId, GpuError> {
        self.bind()?;
        // Without timing: only asked whether it has happened.
        let done = self.event(2)?;
        let mut start: *mut c_void = null_mut();
        let size = bytes.max(1);
        // SAFETY: the driver writes an address; the memory is zeroed before anybody reads it.
        unsafe {
            check("cuMemHostAlloc", sys::cuMemHostAlloc(&raw mut start, size, 0))?;
            std::ptr::write_bytes(start.cast::<u8>(), 0, size);
        }
        self.host.push(Pinned { start: start.cast(), bytes, done });
        Ok(HostId(self.host.len() - 1))
    }

    fn host(&mut self, memory: HostId) -> Result<&mut [u8], GpuError> {
        self.bind()?;
        let Pinned { start, bytes, done } = self.host[memory.0];
        wait(done, Duration::from_secs(60))?;
        // SAFETY: that many zeroed bytes of ours; no copy uses them, and `self` is borrowed.
        Ok(unsafe { std::slice::from_raw_parts_mut(start, bytes) })
    }

    fn copy_in(&mut self, from: HostId, bytes: usize, to: Address) -> Result<(), GpuError> {
        self.bind()?;
        let Pinned { start, bytes: size, done } = self.host[from.0];
        assert!(bytes <= size, "{bytes} bytes of {size}");
        // SAFETY: the source stays until the driver closes, and is not written before `done`.
        let copied = unsafe { sys::cuMemcpyHtoDAsync_v2(to.0, start.cast(), bytes, self.stream) };
        check("cuMemcpyHtoDAsync", copied)?;
        self.record(done)
    }

    fn copy_out(&mut self, from: Address, to: HostId, bytes: usize) -> Result<(), GpuError> {
        self.bind()?;
        let Pinned { start, bytes: size, done } = self.host[to.0];
        assert!(bytes <= size, "{bytes} bytes of {size}");
        if bytes > 0 {
            // SAFETY: the target stays until the driver closes, and is not read before `done`.
            let copied =
                unsafe { sys::cuMemcpyDtoHAsync_v2(start.cast(), from.0, bytes, self.stream) };
            check("cuMemcpyDtoHAsync", copied)?;
        }
        self.record(done)
    }

    fn launch(&mut self, launch: &Launch<'_>) -> Result<(), GpuError> {
        let Launch { kernel, grid: [x, y, z], threads, shared, arguments } = *launch;
        let Kernel { function, overlaps, .. } = self.kernels[kernel.0];
        let mut parameters = [arguments.as_ptr().cast_mut().cast::<c_void>()];
        let mut attribute = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shared,
            hStream: self.stream,
            attrs: &raw mut attribute,
            numAttrs: u32::from(overlaps),
        };
        // SAFETY: the kernel takes one struct, which the driver copies before it returns, as it
        // does the attribute.
        let launched = unsafe {
            let parameters = parameters.as_mut_ptr();
            sys::cuLaunchKernelEx(&raw const config, function, parameters, null_mut())
        };
        check("cuLaunchKernelEx", launched)
    }

    fn timer(&mut self) -> Result<TimerId, GpuError> {
        self.bind()?;
        let pair = [self.event(0)?, self.event(0)?];
        self.timers.push(pair);
        Ok(TimerId(self.timers.len() - 1))
    }

    fn start_timer(&mut self, timer: TimerId) -> Result<(), GpuError> {
        self.bind()?;
        self.record(self.timers[timer.0][0])
    }

    fn stop_timer(&mut self, timer: TimerId) -> Result<(), GpuError> {
        self.record(self.timers[timer.0][1])
    }

    fn await_timer(&mut self, timer: TimerId, patience: Duration) -> Result<Duration, GpuError> {
        self.bind()?;
        let [started, stopped] = self.timers[timer.0];
        wait(stopped, patience)?;
        let mut milliseconds = 0.0;
        // SAFETY: both events have happened; the driver writes one number.
        let measured =
            unsafe { sys::cuEventElapsedTime_v2(&raw mut milliseconds, started, stopped) };
        check("cuEventElapsedTime", measured)?;
        Ok(Duration::from_secs_f32(milliseconds.max(0.0) / 1e3))
    }

    fn begin_graph(&mut self) -> Result<(), GpuError> {
        self.bind()?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is ours and records nothing yet.
        check("cuStreamBeginCapture", unsafe { sys::cuStreamBeginCapture_v2(self.stream, mode) })
    }

    fn end_graph(&mut self) -> Result<GraphId, GpuError> {
        let (mut graph, mut ready) = (null_mut(), null_mut());
        // SAFETY: the stream records; the driver writes handles. An executable graph does not need
        // the one it was made of.
        unsafe {
            let ended = sys::cuStreamEndCapture(self.stream, &raw mut graph);
            check("cuStreamEndCapture", ended)?;
            let made = sys::cuGraphInstantiateWithFlags(&raw mut ready, graph, 0);
            let destroyed = sys::cuGraphDestroy(graph);
            check("cuGraphInstantiate", made)?;
            check("cuGraphDestroy", destroyed)?;
        }
        self.graphs.push(ready);
        Ok(GraphId(self.graphs.len() - 1))
    }

    fn replay(&mut self, graph: GraphId) -> Result<(), GpuError> {
        // SAFETY: graph and stream are ours and open.
        let launched = unsafe { sys::cuGraphLaunch(self.graphs[graph.0], self.stream) };
        check("cuGraphLaunch", launched)
    }

    fn release_graph(&mut self, graph: GraphId) -> Result<(), GpuError> {
        self.bind()?;
        let ready = std::mem::replace(&mut self.graphs[graph.0], null_mut());
        // SAFETY: stream and graph are ours and open; nobody asks for this graph again.
        unsafe {
            check("cuStreamSynchronize", sys::cuStreamSynchronize(self.stream))?;
            check("cuGraphExecDestroy", sys::cuGraphExecDestroy(ready))
        }
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        if self.context.is_null() || self.bind().is_err() {
            return;
        }
        // Failures are not looked at: after a sticky one every call fails, and the process ends.
        // SAFETY: every handle was given by the driver and is closed once, when no work is left.
        unsafe {
            sys::cuStreamSynchronize(self.stream);
            for graph in self.graphs.drain(..).filter(|graph| !graph.is_null()) {
                sys::cuGraphExecDestroy(graph);
            }
            for event in self.timers.drain(..).flatten() {
                sys::cuEventDestroy_v2(event);
            }
            for pinned in self.host.drain(..) {
                sys::cuEventDestroy_v2(pinned.done);
                sys::cuMemFreeHost(pinned.start.cast());
            }
            for address in self.memory.drain(..) {
                sys::cuMemFree_v2(address.0);
            }
            sys::cuModuleUnload(self.module);
            sys::cuStreamDestroy_v2(self.stream);
            sys::cuDevicePrimaryCtxRelease_v2(self.device);
        }
    }
}
