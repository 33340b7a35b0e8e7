//! The GPU of the tests: runs the same `.cu` files on the processor, compiled by g++ when first
//! used. Device memory is host memory, and everything is done when a call returns. Each launch is
//! run forwards and backwards over its threads and must give the same bytes: a missing barrier
//! shows itself.

#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use crate::device::cuda::fault::GpuError;
use crate::device::cuda::{Address, Gpu, GpuInfo, GraphId, HostId, KernelId, Launch, TimerId};

type Run =
    unsafe extern "C" fn(*const c_char, *const u32, bool, *const c_void, u32) -> *const c_char;

/// A GPU that is a processor.
#[derive(Debug)]
pub(crate) struct Emulator {
    info: GpuInfo,
    run: Run,
    memory: BTreeMap<u64, Vec<u128>>,
    kernels: Vec<CString>,
    host: Vec<Vec<u8>>,
    timers: Vec<(Option<Instant>, Duration)>,
    graphs: Vec<Vec<Recorded>>,
    recording: Option<Vec<Recorded>>,
    /// Checks every launch by running it twice.
    pub(crate) twice: bool,
    /// Fails the launch of this number.
    pub(crate) fails_at: Option<(u64, GpuError)>,
    /// Launches so far.
    pub(crate) launches: u64,
    /// Memory that a graph takes.
    pub(crate) graph_bytes: u64,
}

#[derive(Debug, Clone)]
struct Recorded {
    kernel: KernelId,
    grid: [u32; 3],
    threads: u32,
    shared: u32,
    arguments: Vec<u8>,
}

impl Emulator {
    /// Compiles the kernels, if nobody has yet.
    pub(crate) fn new() -> Self {
        Self {
            // So few that tests' small steps fill them, and so many that not all do.
            info: GpuInfo { name: "emulator".into(), processors: 3, ..GpuInfo::default() },
            run: entry(),
            memory: BTreeMap::new(),
            kernels: Vec::new(),
            host: Vec::new(),
            timers: Vec::new(),
            graphs: Vec::new(),
            recording: None,
            twice: true,
            fails_at: None,
            launches: 0,
            graph_bytes: 0,
        }
    }

    fn launch_now(&mut self, launch: &Recorded) -> Result<(), GpuError> {
        self.launches += 1;
        if let Some((at, error)) = &self.fails_at
            && self.launches >= *at
        {
            return Err(error.clone());
        }
        if !self.twice {
            return self.once(launch, false);
        }
        let before: Vec<Vec<u128>> = self.memory.values().cloned().collect();
        self.once(launch, true)?;
        let backwards: Vec<Vec<u128>> = self.memory.values().cloned().collect();
        for (memory, before) in self.memory.values_mut().zip(before) {
            memory.copy_from_slice(&before);
        }
        self.once(launch, false)?;
        let name = &self.kernels[launch.kernel.0];
        let same = self.memory.values().zip(&backwards).all(|(a, b)| a == b);
        assert!(same, "{name:?} depends on the order of its threads");
        Ok(())
    }

    fn once(&self, launch: &Recorded, backwards: bool) -> Result<(), GpuError> {
        let Recorded { kernel, grid, threads, shared, arguments } = launch;
        let geometry = [grid[0], grid[1], grid[2], *threads, *shared];
        let name = &self.kernels[kernel.0];
        // Structs of arguments are aligned to 8 bytes.
        let mut aligned = vec![0_u64; arguments.len().div_ceil(8)];
        bytemuck::cast_slice_mut::<_, u8>(&mut aligned)[..arguments.len()]
            .copy_from_slice(arguments);
        // SAFETY: the name ends in zero, the geometry is five words, and the emulator checks the
        // size of the arguments. What addresses they hold is what the test is about.
        let complaint = unsafe {
            let arguments_start = aligned.as_ptr().cast();
            (self.run)(
                name.as_ptr(),
                geometry.as_ptr(),
                backwards,
                arguments_start,
                arguments.len() as u32,
            )
        };
        if complaint.is_null() {
            return Ok(());
        }
        // SAFETY: a complaint is a string constant of the emulator.
        let complaint = unsafe { CStr::from_ptr(complaint) };
        panic!("{name:?}: {}", complaint.to_string_lossy());
    }

    /// Where an address lies, checked.
    fn at(&mut self, address: Address, bytes: usize) -> &mut [u8] {
        let (start, memory) =
            self.memory.range_mut(..=address.0).next_back().expect("an address of this device");
        let from = (address.0 - start) as usize;
        &mut bytemuck::cast_slice_mut(memory)[from..from + bytes]
    }
}

impl Gpu for Emulator {
    fn info(&self) -> &GpuInfo {
        &self.info
    }

    fn free_bytes(&mut self) -> Result<u64, GpuError> {
        let graphs = self.graphs.iter().filter(|graph| !graph.is_empty()).count();
        let memory: usize = self.memory.values().map(|memory| 16 * memory.len()).sum();
        Ok((1 << 30) - memory as u64 - graphs as u64 * self.graph_bytes)
    }

    fn kernel(&mut self, name: &str, shared: u32) -> Result<KernelId, GpuError> {
        assert!(shared <= 96 << 10, "{name}: an L4 has not so much shared memory");
        self.kernels.push(CString::new(name).expect("a name"));
        Ok(KernelId(self.kernels.len() - 1))
    }

    fn reserve(&mut self, bytes: usize) -> Result<Address, GpuError> {
        let memory = vec![0_u128; bytes.div_ceil(16).max(1)];
        let address = memory.as_ptr() as u64;
        self.memory.insert(address, memory);
        Ok(Address(address))
    }

    fn release(&mut self, address: Address) -> Result<(), GpuError> {
        self.memory.remove(&address.0).expect("reserved");
        Ok(())
    }

    fn upload(&mut self, to: Address, bytes: &[u8]) -> Result<(), GpuError> {
        self.at(to, bytes.len()).copy_from_slice(bytes);
        Ok(())
    }

    fn download(&mut self, from: Address, into: &mut [u8]) -> Result<(), GpuError> {
        into.copy_from_slice(self.at(from, into.len()));
        Ok(())
    }

    fn host_memory(&mut self, bytes: usize) -> Result<HostId, GpuError> {
        self.host.push(vec![0; bytes]);
        Ok(HostId(self.host.len() - 1))
    }

    fn host(&mut self, memory: HostId) -> Result<&mut [u8], GpuError> {
        Ok(&mut self.host[memory.0])
    }

    fn copy_in(&mut self, from: HostId, bytes: usize, to: Address) -> Result<(), GpuError> {
        let source = self.host[from.0][..bytes].to_vec();
        self.upload(to, &source)
    }

    fn copy_out(&mut self, from: Address, to: HostId, bytes: usize) -> Result<(), GpuError> {
        let source = self.at(from, bytes).to_vec();
        self.host[to.0][..bytes].copy_from_slice(&source);
        Ok(())
    }

    fn launch(&mut self, launch: &Launch<'_>) -> Result<(), GpuError> {
        let Launch { kernel, grid, threads, shared, arguments } = *launch;
        let recorded = Recorded { kernel, grid, threads, shared, arguments: arguments.to_vec() };
        match &mut self.recording {
            Some(recording) => recording.push(recorded),
            None => self.launch_now(&recorded)?,
        }
        Ok(())
    }

    fn timer(&mut self) -> Result<TimerId, GpuError> {
        self.timers.push((None, Duration::ZERO));
        Ok(TimerId(self.timers.len() - 1))
    }

    fn start_timer(&mut self, timer: TimerId) -> Result<(), GpuError> {
        self.timers[timer.0].0 = Some(Instant::now());
        Ok(())
    }

    fn stop_timer(&mut self, timer: TimerId) -> Result<(), GpuError> {
        let (started, elapsed) = &mut self.timers[timer.0];
        *elapsed = started.take().expect("started").elapsed();
        Ok(())
    }

    fn await_timer(&mut self, timer: TimerId, _: Duration) -> Result<Duration, GpuError> {
        Ok(self.timers[timer.0].1)
    }

    fn begin_graph(&mut self) -> Result<(), GpuError> {
        assert!(self.recording.replace(Vec::new()).is_none(), "recording already");
        Ok(())
    }

    fn end_graph(&mut self) -> Result<GraphId, GpuError> {
        self.graphs.push(self.recording.take().expect("recording"));
        Ok(GraphId(self.graphs.len() - 1))
    }

    fn release_graph(&mut self, graph: GraphId) -> Result<(), GpuError> {
        self.graphs[graph.0] = Vec::new();
        Ok(())
    }

    fn replay(&mut self, graph: GraphId) -> Result<(), GpuError> {
        for launch in self.graphs[graph.0].clone() {
            self.launch_now(&launch)?;
        }
        Ok(())
    }
}

/// The emulator's entry point, compiled once for each state of the sources; sources that do not
/// compile are tried once, too, and fail all tests by the same words.
fn entry() -> Run {
    static ENTRY: OnceLock<Result<Run, String>> = OnceLock::new();
    let entry = ENTRY.get_or_init(|| {
        let library = CString::new(compile()?.into_os_string().into_encoded_bytes())
            .expect("a path without zeros");
        // SAFETY: the library is our own and has no constructors that do anything.
        let handle = unsafe { libc::dlopen(library.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        assert!(!handle.is_null(), "{library:?} cannot be loaded");
        // SAFETY: the handle is open and stays so.
        let symbol = unsafe { libc::dlsym(handle, c"emulate_launch".as_ptr()) };
        assert!(!symbol.is_null(), "{library:?} has no entry point");
        // SAFETY: `emulate.cpp` declares it so.
        Ok(unsafe { std::mem::transmute::<*mut c_void, Run>(symbol) })
    });
    match entry {
        Ok(run) => *run,
        Err(said) => panic!("the emulator does not compile:\n{said}"),
    }
}

/// Where the library is, or what the compiler says.
fn compile() -> Result<PathBuf, String> {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/kernels/cuda");
    let mut files: Vec<PathBuf> = std::fs::read_dir(&sources)
        .expect("the kernels' folder")
        .map(|entry| entry.expect("a file").path())
        .filter(|path| path.extension().is_some_and(|ending| ending != "rs"))
        .collect();
    files.sort();
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for byte in files.iter().flat_map(|file| std::fs::read(file).expect("a source")) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    let folder = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("target"), PathBuf::from)
        .join("emulator");
    std::fs::create_dir_all(&folder).expect("a folder for the emulator");
    let library = folder.join(format!("{hash:016x}.so"));
    if library.exists() {
        return Ok(library);
    }
    // Under a name of its own, for other tests may do the same.
    let own = folder.join(format!("{hash:016x}.{}.so", std::process::id()));
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "g++".into());
    let compiled = Command::new(compiler)
        .args(["-std=c++17", "-O2", "-g1", "-ffp-contract=off", "-fPIC", "-shared"])
        .args(["-U_FORTIFY_SOURCE", "-Wall", "-Werror", "-Wno-unknown-pragmas"])
        .args(["-fsanitize=undefined", "-fno-sanitize-recover=all"])
        .arg("-o")
        .args([&own, &sources.join("emulate.cpp")])
        .output()
        .expect("a C++ compiler");
    if !compiled.status.success() {
        return Err(String::from_utf8_lossy(&compiled.stderr).into_owned());
    }
    std::fs::rename(&own, &library).expect("the emulator's place");
    Ok(library)
}
