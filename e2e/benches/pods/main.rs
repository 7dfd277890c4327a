//! How long pods take that are created at once, and a new version of Basal to reach all nodes, in a real cluster with two
//! kubelets, beside the same cluster with Debian's bridge and host-local plugins.
//!
//! `PODS=100` says how many pods, `PASSES=2` how often each kind of cluster is made, in turns, and `ROUNDS=2` how often the
//! pods come and go in each. Needs root, and the images of `cargo xtask setup --profile release`.

mod case;

use std::{collections::BTreeMap, fs};

use anyhow::Context as _;
use basal_e2e::{
    bench::{self, Row},
    cluster, parts,
    say::say,
};

use self::case::{Case, Found};

const READY: &str = "kubectl apply of one Deployment, spread over two nodes, until `kubectl rollout status` says that all its pods are \
                     ready; the median of all rounds, clusters in turns; real API server, scheduler, kubelets, containerd and kube-proxy on the \
                     same machine. The bridge gives pods one IPv4 address, Basal one of each family";

const GONE: &str = "`kubectl delete deployment --cascade=foreground` until it ends, which is when the last pod object is gone; otherwise as for \
                    the time until they are ready";

const UPGRADE: &str = "helm upgrade with another value of one key of the configuration, until operator and agents have rolled out on both \
                       nodes, each ready again, while the pods of a round run; the image is on the nodes already";

fn main() -> anyhow::Result<()> {
    cluster::run_if_asked();
    let (pods, passes, rounds) = (number("PODS", 100)?, number("PASSES", 2)?, number("ROUNDS", 2)?);
    let mut found: BTreeMap<Case, Found> = BTreeMap::new();
    for _ in 0..passes {
        for case in Case::ALL {
            say(format!("{pods} pods, {}", case.text()));
            found.entry(case).or_default().extend(case::run(case, pods, rounds)?);
        }
    }
    let rows = rows(pods, &found)?;
    bench::publish("pods", &rows)
}

/// A number that is given by the environment.
fn number(name: &str, default: usize) -> anyhow::Result<usize> {
    match bench::setting(name) {
        Some(text) => text.parse().with_context(|| format!("{name} is no number")),
        None => Ok(default),
    }
}

fn rows(pods: usize, found: &BTreeMap<Case, Found>) -> anyhow::Result<Vec<Row>> {
    let median_of = |case: Case, figures: fn(&Found) -> &Vec<f64>| {
        found.get(&case).map(|found| bench::median(figures(found).clone()))
    };
    let mut rows = Vec::new();
    for case in [Case::Etcd, Case::CustomResources] {
        let mut against = |metric: &str, method: &str, figures: fn(&Found) -> &Vec<f64>| {
            let bridge = median_of(Case::Bridge, figures).unwrap_or_default();
            let value = median_of(case, figures).unwrap_or_default();
            let metric = format!("{pods} pods, {metric}, {}", case.text());
            rows.push(Row::new(metric, value, "s", method).against(Case::Bridge.text(), bridge));
        };
        against("created at once until ready", READY, |found| &found.ready);
        against("deleted until gone", GONE, |found| &found.gone);
        let upgrade = median_of(case, |found| &found.upgrade).unwrap_or_default();
        rows.push(Row::new(format!("helm upgrade to two nodes, {}", case.text()), upgrade, "s", UPGRADE));
    }
    let image = parts::cache_dir()?.join("images/basal.tar");
    let bytes = fs::metadata(&image).with_context(|| format!("{} is missing", image.display()))?.len();
    let size = bytes as f64 / 1e6;
    rows.push(Row::new(
        "image of operator and agent, not compressed",
        size,
        "MB",
        "size of the archive that nodes import",
    ));
    Ok(rows)
}
