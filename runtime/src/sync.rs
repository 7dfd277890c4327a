//! The one way in which Basal locks a mutex.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks. A mutex whose holder panicked is taken as it is: release builds abort on a panic, and every holder here
/// leaves the value whole between statements.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
