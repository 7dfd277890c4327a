//! `basal`: what an admin types on a node. Text is laid out as Cilium's `cilium-dbg` lays it out. It writes
//! nothing, neither a map, nor to the API server, nor to etcd, but for what `ipam check --fix` says before it does it.

#[cfg(feature = "bpf")]
mod bpf;
mod ipam;
mod output;
mod show;
mod status;
mod table;

use std::{path::PathBuf, process::ExitCode};

use clap::{CommandFactory as _, Parser, Subcommand};

use output::Format;

/// Shows what Basal's agent knows and what its BPF maps hold
#[derive(Parser)]
#[command(name = "basal", version)]
struct Args {
    /// The agent's socket
    #[arg(long, global = true, env = "BASAL_SOCKET", default_value = basal_cni::conf::DEFAULT_SOCKET)]
    socket: PathBuf,

    /// How to print: text or json
    #[arg(short, long, global = true, default_value = "text")]
    output: Format,

    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Health of this node's agent; the exit code is 1 when something is at fault
    Status,
    /// Pinned BPF maps, in the formats of `cilium-dbg bpf`; works without an agent
    #[cfg(feature = "bpf")]
    #[command(subcommand)]
    Bpf(bpf::Command),
    /// Nodes of the cluster that the agent knows
    #[command(subcommand)]
    Node(List),
    /// Endpoints on this node that the agent knows
    #[command(subcommand)]
    Endpoint(List),
    /// Security identities that the agent knows
    #[command(subcommand)]
    Identity(List),
    /// This node's blocks and addresses
    Ipam {
        /// What to ask; nothing: this node
        #[command(subcommand)]
        command: Option<ipam::Command>,
    },
}

#[derive(Subcommand)]
enum List {
    /// List all
    List,
}

/// All that can be typed, for documentation.
#[must_use]
pub fn command() -> clap::Command {
    Args::command()
}

/// Does what this process's arguments say.
#[must_use]
pub fn main() -> ExitCode {
    let args = Args::parse();
    let done = match &args.command {
        Command::Status => status::run(&args.socket, args.output),
        #[cfg(feature = "bpf")]
        Command::Bpf(command) => bpf::run(command, args.output),
        Command::Node(List::List) => show::nodes(&args.socket, args.output),
        Command::Endpoint(List::List) => show::endpoints(&args.socket, args.output),
        Command::Identity(List::List) => show::identities(&args.socket, args.output),
        Command::Ipam { command: None } => show::ipam(&args.socket, args.output),
        Command::Ipam { command: Some(command) } => Ok(ipam::run(command, args.output)),
    };
    done.unwrap_or_else(|error| {
        output::complain(&format!("Error: {error:#}"));
        ExitCode::FAILURE
    })
}
