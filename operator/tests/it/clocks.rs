//! Replicas whose wall clocks are minutes apart: nobody takes a Lease that is renewed, and no block rests shorter. Certificates
//! are another matter: whoever checks them goes by the wall clock.

use std::time::Duration;

use basal_ipam::config::PoolConfig;
use basal_objects::object::resources;
use basal_sim::world::{Trouble, World};

use crate::cluster::{LIMIT, Over, QUARANTINE, add_node, delete, is_served, leader, operator, pool, run};

/// How far the clock of one replica is off.
const OFF_BY: [i64; 2] = [300, -300];

/// Longer than a Lease lasts, several times.
const LONG: Duration = Duration::from_secs(120);

/// Two that have served a node: the one that leads, and the other.
async fn replicas(world: &World, over: Over, pool: &PoolConfig) -> Result<(&'static str, &'static str), Trouble> {
    operator(world, over, "a", pool);
    operator(world, over, "b", pool);
    add_node(world, "n1", 1).await;
    world.until("n1 is served", LIMIT, |world| is_served(world, "n1")).await?;
    Ok(if leader(world).starts_with("a/") { ("a", "b") } else { ("b", "a") })
}

#[test]
fn a_lease_is_not_taken_early_by_a_clock_that_is_five_minutes_off() {
    for seconds in OFF_BY {
        run(70, async |world, over| {
            let (leads, waits) = replicas(world, over, &pool(&["10.0.0.0/16"], &["fd00::/104"])).await?;
            let held = leader(world);
            world.move_clock(waits, seconds);
            world.pass(LONG).await?;
            assert_eq!(leader(world), held, "the clock of a replica that waits is off by {seconds} s");
            world.move_clock(leads, -2 * seconds);
            world.pass(LONG).await?;
            assert_eq!(leader(world), held, "the clock of the leader is off by {} s", -2 * seconds);
            // It is taken in time once nobody renews it.
            world.stop(leads);
            world.until("the other one leads", LIMIT, |world| leader(world).starts_with(waits)).await?;
            add_node(world, "n2", 2).await;
            world.until("n2 is served", LIMIT, |world| is_served(world, "n2")).await
        });
    }
}

/// The only block of each family passes from one node to another, while the clock jumps and another replica takes over: that
/// it rested is looked at after each change (`BlockSafety`).
#[test]
fn a_block_does_not_rest_shorter_by_a_clock_that_is_five_minutes_off() {
    for seconds in OFF_BY {
        run(71, async |world, over| {
            let (leads, waits) = replicas(world, over, &pool(&["10.0.0.0/24"], &["fd00::/120"])).await?;
            world.move_clock(waits, seconds);
            delete(world, resources::NODE, "n1").await;
            add_node(world, "n2", 2).await;
            world.pass(QUARANTINE / 3).await?;
            world.move_clock(leads, -seconds);
            world.pass(QUARANTINE / 3).await?;
            world.stop(leads);
            world.until("n2 is served by the other one", LIMIT, |world| is_served(world, "n2")).await?;
            assert!(leader(world).starts_with(waits), "{}", leader(world));
            Ok(())
        });
    }
}
