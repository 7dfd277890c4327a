//! `basal bpf … list`: the pinned maps, in the formats of `cilium-dbg bpf`.

mod pinned;
mod render;

use std::{collections::BTreeMap, path::PathBuf, process::ExitCode};

use clap::Subcommand;

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
    }
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
