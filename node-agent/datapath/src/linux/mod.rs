//! The real kernel: rtnetlink for devices, addresses and routes, files for parameters, aya for programs and maps, the
//! `nft` command for nftables, iptables' own commands for its FORWARD chains.
//!
//! Everything happens in the network namespace of the thread that made the [`LinuxKernel`] and on one bpffs.

mod batch;
mod clsact;
mod command;
mod fault;
mod flows;
mod forward;
mod group;
mod hooks;
mod links;
pub mod maps;
mod netlink;
mod nft;
mod pod;
pub mod probe;
mod programs;
mod routes;
mod sys;
mod sysctl;
mod tcx;

use std::{
    io,
    path::{Path, PathBuf},
};

use async_trait::async_trait;
use basal_runtime::{
    env::{SharedEnv, TaskHandle},
    outcome::Outcome,
};
use futures::stream::BoxStream;
use tokio::sync::Mutex;

use self::{fault::Fault, hooks::KnownSlots, maps::PinnedMaps};
use crate::{
    flows::MapUse,
    kernel::{Device, Kernel, KernelEvent, Observed, OpError, PodDevice, ReadError},
    names::IfName,
    op::Op,
    rows::MapId,
};

/// Where things are, and how programs are attached. The default is what a node has.
#[derive(Debug, Clone)]
pub struct Paths {
    /// The mounted bpffs.
    pub bpffs: PathBuf,
    /// Kernel parameters.
    pub sysctl: PathBuf,
    /// The `nft` command.
    pub nft: PathBuf,
    /// Attach by tcx links where the kernel has them (Cilium's `enable-tcx`), else by clsact filters.
    pub tcx: bool,
}

impl Default for Paths {
    fn default() -> Self {
        Self { bpffs: "/sys/fs/bpf".into(), sysctl: "/proc/sys".into(), nft: "nft".into(), tcx: true }
    }
}

impl Paths {
    /// Pins of maps, where Cilium's tools look for them.
    #[must_use]
    pub fn maps(&self) -> PathBuf {
        self.bpffs.join("tc/globals")
    }

    /// Pins of program sets, one folder each. Ours alone; Cilium does not pin programs.
    fn programs(&self) -> PathBuf {
        self.bpffs.join("basal/programs")
    }

    /// Where program sets are put together, by name. On the same bpffs, so that they can be renamed.
    fn staging(&self) -> PathBuf {
        self.bpffs.join("basal/staging")
    }

    /// Pins of links, as Cilium names them.
    fn links(&self) -> PathBuf {
        self.bpffs.join("cilium")
    }
}

/// The [`Kernel`] of the machine that this runs on.
pub struct LinuxKernel {
    env: SharedEnv,
    paths: Paths,
    netlink: rtnetlink::Handle,
    /// Held while the kernel lists something: until a list was read to its end, the socket gets EBUSY for the next one.
    lists: Mutex<()>,
    maps: PinnedMaps,
    /// Attach by tcx links.
    tcx: bool,
    slots: KnownSlots,
    /// Drives the netlink socket.
    connection: TaskHandle,
}

impl LinuxKernel {
    /// Opens netlink in the calling thread's network namespace. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// When netlink cannot be opened.
    pub fn new(env: &SharedEnv, paths: Paths) -> io::Result<Self> {
        let (connection, netlink, _) = rtnetlink::new_connection()?;
        let connection = env.spawn("netlink", Box::pin(connection));
        let maps = PinnedMaps::new(paths.maps());
        let tcx = paths.tcx && probe::has_tcx();
        Ok(Self {
            env: SharedEnv::clone(env),
            paths,
            netlink,
            lists: Mutex::new(()),
            maps,
            tcx,
            slots: KnownSlots::default(),
            connection,
        })
    }

    /// The pinned maps, for counters and listings.
    #[must_use]
    pub fn maps(&self) -> &PinnedMaps {
        &self.maps
    }

    /// Reads everything, and of the maps those that are asked for.
    async fn read_with(&self, maps: impl Iterator<Item = MapId> + Send) -> Result<Observed, ReadError> {
        let mut observed = Observed::default();
        let turn = self.lists.lock().await;
        links::read(&self.netlink, &mut observed).await?;
        routes::read(&self.netlink, &mut observed).await?;
        sysctl::read(&self.paths.sysctl, &mut observed.state)?;
        let loaded = programs::read(&self.paths)?;
        self.maps.read(maps, &mut observed.state)?;
        hooks::read(&self.netlink, &self.paths, self.tcx, &self.slots, &loaded, &mut observed).await?;
        drop(turn);
        loaded.tell(&mut observed.state);
        let tables = nft::tables(&self.paths.nft).await?;
        observed.state.nft = nft::read(&self.paths.nft, &tables).await?;
        observed.state.forward = forward::read(&tables).await?;
        Ok(observed)
    }

    async fn try_apply(&self, op: &Op) -> Result<(), Fault> {
        let lists = matches!(op, Op::DeleteAddress(_) | Op::Attach(..) | Op::Detach(_));
        let _turn = if lists { Some(self.lists.lock().await) } else { None };
        match op {
            Op::SetSysctl(key, value) => sysctl::write(&self.paths.sysctl, key, value),
            Op::SetLink(name, link) => links::set(&self.netlink, &self.env, &self.paths, name, link).await,
            Op::DeleteLinks(names) => group::delete(&self.netlink, &self.lists, names).await,
            Op::AddAddress(address) => links::add_address(&self.netlink, address).await,
            Op::DeleteAddress(address) => links::delete_address(&self.netlink, address).await,
            Op::LoadPrograms { set, rows } => programs::load(&self.paths, set, rows),
            Op::UnloadPrograms(hash) => programs::unload(&self.paths, *hash),
            Op::PutRow(row) => self.maps.put(row),
            Op::DeleteRow { map, key } => self.maps.delete(*map, key),
            Op::Attach(hook, hash) => {
                hooks::attach(&self.netlink, &self.paths, self.tcx, &self.slots, hook, *hash).await
            }
            Op::Detach(hook) => hooks::detach(&self.netlink, &self.paths, &self.slots, hook).await,
            Op::SetRoute(key, route) => routes::set(&self.netlink, key, route).await,
            Op::DeleteRoute(key) => routes::delete(&self.netlink, key).await,
            Op::SetNft(name, table) => nft::set(&self.paths.nft, name, table).await,
            Op::DeleteNft(name) => nft::delete(&self.paths.nft, name).await,
            Op::SetForward(table, rules) => forward::set(*table, rules).await,
        }
    }
}

#[async_trait]
impl Kernel for LinuxKernel {
    async fn read(&self) -> Result<Observed, ReadError> {
        self.read_with(MapId::ALL.into_iter()).await
    }

    async fn read_without_ipcache(&self) -> Result<Observed, ReadError> {
        self.read_with(MapId::ALL.into_iter().filter(|map| *map != MapId::Ipcache)).await
    }

    async fn device(&self, name: &IfName) -> Result<Option<Device>, ReadError> {
        let _turn = self.lists.lock().await;
        links::find(&self.netlink, name).await
    }

    async fn pod_device(&self, netns: &Path, name: &IfName) -> Result<Option<PodDevice>, ReadError> {
        pod::look(&self.env, netns, name).await
    }

    async fn apply(&self, op: &Op) -> Outcome<(), OpError> {
        match self.try_apply(op).await {
            Ok(()) => Outcome::Done(()),
            Err(fault) => fault.answer(op),
        }
    }

    async fn collect_flows(&self) -> Result<Vec<MapUse>, ReadError> {
        let maps = self.maps.clone();
        let collected = tokio::task::spawn_blocking(move || flows::collect(&maps)).await;
        collected.unwrap_or_else(|error| Err(io::Error::other(error))).map_err(|error| ReadError::new("flows", error))
    }

    fn events(&self) -> BoxStream<'static, KernelEvent> {
        netlink::events(&self.env)
    }
}

impl Drop for LinuxKernel {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

/// Removes a pin; one that is not there is no error.
fn remove_pin(pin: &Path) -> io::Result<()> {
    match std::fs::remove_file(pin) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Removes a folder of pins with everything in it; one that is not there is no error.
fn remove_pins(dir: &Path) -> io::Result<()> {
    match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
