//! `basal bpf … list`: the pinned maps, in the formats of `cilium-dbg bpf`.

mod flows;
mod pinned;
mod render;

use std::{collections::BTreeMap, fmt::Display, path::PathBuf, process::ExitCode};

use clap::Subcommand;
use serde::Serialize;

use crate::{
    output::{Format, complain, print, print_json},
    table::{lay_out, row},
};

/// Which map.
#[derive(Subcommand)]
pub(crate) enum Command {
    /// Local endpoints (`cilium_lxc`)
    #[command(subcommand)]
    Endpoint(List),
    /// PodCIDRs and the nodes that they are at (`cilium_tunnel_map`)
    #[command(subcommand)]
    Tunnel(List),
    /// Identities and tunnel endpoints of addresses (`cilium_ipcache_v2`)
    #[command(subcommand)]
    Ipcache(List),
    /// Node ids (`cilium_node_map_v2`)
    #[command(subcommand)]
    Nodeid(List),
    /// Packets that were forwarded and dropped (`cilium_metrics`)
    #[command(subcommand)]
    Metrics(List),
    /// Connections that programs follow (`cilium_ct4_global` and its siblings); with `enable-bpf-masquerade`
    #[command(subcommand)]
    Ct(CtCommand),
    /// Translations of masqueraded flows (`cilium_snat_v4_external` and its sibling); with `enable-bpf-masquerade`
    #[command(subcommand)]
    Nat(List),
    /// Networks that pods' packets go to as they are (`cilium_ipmasq_v4` and its sibling); with `enable-bpf-masquerade`
    #[command(subcommand)]
    Ipmasq(List),
    /// TCP connections that go past the host stack (`basal_direct_v4` and its sibling); with
    /// `enable-host-legacy-routing: false`
    #[command(subcommand)]
    Direct(List),
}

/// What to do with connections.
#[derive(Subcommand)]
pub(crate) enum CtCommand {
    /// List all rows
    List {
        /// Which connections: those of the whole node
        #[arg(value_enum)]
        which: Which,
        /// Folder of the pinned maps
        #[arg(long, default_value = "/sys/fs/bpf/tc/globals")]
        maps: PathBuf,
    },
}

/// Which connections. Cilium has others, too.
#[derive(Clone, Copy, clap::ValueEnum)]
pub(crate) enum Which {
    /// Those of the whole node
    Global,
}

/// What to do with it.
#[derive(Subcommand)]
pub(crate) enum List {
    /// List all rows
    List {
        /// Folder of the pinned maps
        #[arg(long, default_value = "/sys/fs/bpf/tc/globals")]
        maps: PathBuf,
    },
}

/// Rows of two columns: a key with all its values.
pub(crate) type Pairs = BTreeMap<String, Vec<String>>;

/// Lists a map.
pub(crate) fn run(command: &Command, format: Format) -> anyhow::Result<ExitCode> {
    match command {
        Command::Endpoint(List::List { maps }) => {
            pairs(["IP ADDRESS", "LOCAL ENDPOINT INFO"], &render::endpoints(&pinned::endpoints(maps)?), format)
        }
        Command::Tunnel(List::List { maps }) => {
            pairs(["TUNNEL", "VALUE"], &render::tunnels(&pinned::tunnels(maps)?), format)
        }
        Command::Ipcache(List::List { maps }) => {
            pairs(["IP PREFIX/ADDRESS", "IDENTITY"], &render::ipcache(&pinned::ipcache(maps)?), format)
        }
        Command::Nodeid(List::List { maps }) => {
            let nodes = render::node_ids(&pinned::node_ids(maps)?);
            if format == Format::Json {
                return print_json(&nodes);
            }
            let mut rows = vec![row(["NODE ID", "IP ADDRESSES", "SPI"])];
            rows.extend(nodes.iter().map(|node| row([&node.id, &node.ips.join(", "), &node.spi.to_string()])));
            print(&lay_out(&rows))
        }
        Command::Metrics(List::List { maps }) => {
            let metrics = render::metrics(&pinned::metrics(maps)?);
            if format == Format::Json {
                return print_json(&metrics);
            }
            if metrics.is_empty() {
                complain("No entries found.");
                return Ok(ExitCode::SUCCESS);
            }
            let mut rows: Vec<Vec<String>> = metrics.iter().map(render::Metric::cells).collect();
            rows.sort();
            rows.insert(0, row(["REASON", "DIRECTION", "PACKETS", "BYTES", "LINE", "FILE"]));
            print(&lay_out(&rows))
        }
        Command::Ct(CtCommand::List { which: Which::Global, maps }) => lines(&flows::connections(maps)?, format),
        Command::Nat(List::List { maps }) => lines(&flows::translations(maps)?, format),
        Command::Direct(List::List { maps }) => lines(&flows::direct(maps)?, format),
        Command::Ipmasq(List::List { maps }) => {
            let networks = pinned::exempt(maps)?;
            if format == Format::Json {
                return print_json(&networks);
            }
            let mut rows = vec![row(["IP PREFIX/ADDRESS"])];
            rows.extend(networks.iter().map(|network| row([&network.to_string()])));
            print(&lay_out(&rows))
        }
    }
}

/// One line for each.
fn lines<T: Display + Serialize>(things: &[T], format: Format) -> anyhow::Result<ExitCode> {
    if format == Format::Json {
        return print_json(&things);
    }
    print(&things.iter().map(|thing| format!("{thing}\n")).collect::<String>())
}

fn pairs(titles: [&str; 2], pairs: &Pairs, format: Format) -> anyhow::Result<ExitCode> {
    if format == Format::Json {
        return print_json(pairs);
    }
    let mut rows = vec![row(titles)];
    for (key, values) in pairs {
        for (i, value) in values.iter().enumerate() {
            rows.push(row([if i == 0 { key } else { "" }, value]));
        }
    }
    print(&lay_out(&rows))
}
