//! The commands of `basal`, from its clap struct.

use std::collections::BTreeMap;

use clap::{Arg, ArgAction, Command};

use crate::{
    keys::{default, one_line},
    page::{code, table},
};

/// The table of commands.
pub(crate) fn commands(root: &Command) -> String {
    let mut rows = Vec::new();
    for command in root.get_subcommands() {
        walk(root.get_name(), command, &mut rows);
    }
    table(["command", "what"], rows)
}

/// A command and those below it. Where there is only one below, and it has to be named, the two are one row, and what the
/// upper one says of itself is said.
fn walk(above: &str, command: &Command, rows: &mut Vec<[String; 2]>) {
    let mut path = format!("{above} {}", command.get_name());
    let mut below: Vec<&Command> = command.get_subcommands().collect();
    if let [only] = below.as_slice()
        && command.is_subcommand_required_set()
    {
        path = format!("{path} {}", only.get_name());
        below.clear();
    }
    rows.push([code(&path), command.get_about().map(one_line).unwrap_or_default()]);
    for command in below {
        walk(&path, command, rows);
    }
}

/// The table of options, each with the commands that have it.
pub(crate) fn options(root: &Command) -> String {
    let mut of: BTreeMap<String, (&Arg, Vec<String>)> = BTreeMap::new();
    gather(root.get_name(), root, &mut of);
    let rows = of.into_iter().map(|(name, (arg, paths))| {
        let meaning = arg.get_help().map(one_line).unwrap_or_default();
        let variable = arg.get_env().map(|name| format!(" (environment `{}`)", name.to_string_lossy()));
        [code(&name), code(&shared(&paths)), default(arg), meaning + &variable.unwrap_or_default()]
    });
    table(["option", "of", "default", "meaning"], rows)
}

fn gather<'c>(path: &str, command: &'c Command, of: &mut BTreeMap<String, (&'c Arg, Vec<String>)>) {
    for arg in command.get_arguments() {
        let Some(long) = arg.get_long() else { continue };
        if matches!(arg.get_action(), ArgAction::Help | ArgAction::Version) {
            continue;
        }
        let name = arg.get_short().map_or_else(|| format!("--{long}"), |short| format!("--{long}, -{short}"));
        of.entry(name).or_insert_with(|| (arg, Vec::new())).1.push(path.to_owned());
    }
    for below in command.get_subcommands() {
        gather(&format!("{path} {}", below.get_name()), below, of);
    }
}

/// The command that is above all of these, or the only one.
fn shared(paths: &[String]) -> String {
    let words: Vec<Vec<&str>> = paths.iter().map(|path| path.split(' ').collect()).collect();
    let first = words.first().cloned().unwrap_or_default();
    let same = |i: &usize| words.iter().all(|path| path.get(*i) == first.get(*i));
    let length = (0..first.len()).take_while(same).count();
    first[..length].join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tool() -> Command {
        let list =
            || Command::new("list").about("List").arg(Arg::new("maps").long("maps").default_value("/x").help("Where"));
        let of =
            |name: &'static str, about| Command::new(name).about(about).subcommand_required(true).subcommand(list());
        let bpf =
            Command::new("bpf").about("Maps").subcommand_required(true).subcommands([of("a", "As"), of("b", "Bs")]);
        let bpf = bpf.subcommand(Command::new("c").about("Cs").subcommand(Command::new("check").about("Check")));
        Command::new("tool").arg(Arg::new("out").long("out").short('o').help("How")).subcommand(bpf)
    }

    #[test]
    fn every_command_has_a_row() {
        let text = commands(&tool());
        let rows: Vec<&str> = text.lines().skip(2).collect();
        let expected =
            [("bpf", "Maps"), ("bpf a list", "As"), ("bpf b list", "Bs"), ("bpf c", "Cs"), ("bpf c check", "Check")];
        assert_eq!(rows, expected.map(|(path, about)| format!("| `tool {path}` | {about} |")));
    }

    #[test]
    fn an_option_names_what_has_it() {
        let text = options(&tool());
        let rows: Vec<&str> = text.lines().skip(2).collect();
        assert_eq!(rows, ["| `--maps` | `tool bpf` | `/x` | Where |", "| `--out, -o` | `tool` |  | How |"]);
    }
}
