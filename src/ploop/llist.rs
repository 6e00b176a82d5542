//! A lock-free list that many threads push to and one takes whole: the shape of
//! the kernel's `llist`, with which the series replaced its locked lists.
//!
//! Taking everything at once leaves no room for an ABA problem: no node is ever
//! popped while others look at it.

use std::ptr;

use super::sync::atomic::{AtomicPtr, Ordering};

struct Node<T> {
    next: *mut Node<T>,
    value: T,
}

/// A list with any number of producers. See the module's text.
pub struct LockFreeList<T> {
    head: AtomicPtr<Node<T>>,
}

// SAFETY: a node is reachable from one place at a time: its producer until the
// push, the list, then whoever took it. Values only move between threads.
unsafe impl<T: Send> Send for LockFreeList<T> {}
// SAFETY: as above; no method gives out a reference to a value in the list.
unsafe impl<T: Send> Sync for LockFreeList<T> {}

impl<T> Default for LockFreeList<T> {
    fn default() -> Self {
        Self {
            head: AtomicPtr::new(ptr::null_mut()),
        }
    }
}

impl<T> LockFreeList<T> {
    /// Adds a value. What happened before is seen by whoever takes it.
    pub fn push(&self, value: T) {
        let node = Box::into_raw(Box::new(Node {
            next: ptr::null_mut(),
            value,
        }));
        let mut head = self.head.load(Ordering::Relaxed);
        loop {
            // SAFETY: until the exchange below succeeds, the node is ours alone.
            unsafe { (*node).next = head };
            match self
                .head
                .compare_exchange_weak(head, node, Ordering::Release, Ordering::Relaxed)
            {
                Ok(_) => return,
                Err(seen) => head = seen,
            }
        }
    }

    /// Whether there was nothing at the moment of the call.
    pub fn is_empty(&self) -> bool {
        self.head.load(Ordering::Acquire).is_null()
    }

    /// Takes everything, oldest first.
    pub fn take_all(&self) -> Taken<T> {
        if self.is_empty() {
            return Taken {
                next: ptr::null_mut(),
            };
        }
        let mut newest = self.head.swap(ptr::null_mut(), Ordering::Acquire);
        let mut oldest = ptr::null_mut();
        while !newest.is_null() {
            // SAFETY: the swap made the whole list ours; each node was made by
            // `Box::into_raw` and its pusher does not touch it any more.
            let node = unsafe { &mut *newest };
            let next = std::mem::replace(&mut node.next, oldest);
            oldest = newest;
            newest = next;
        }
        Taken { next: oldest }
    }
}

impl<T> Drop for LockFreeList<T> {
    fn drop(&mut self) {
        drop(self.take_all());
    }
}

/// What [`LockFreeList::take_all`] took.
pub struct Taken<T> {
    next: *mut Node<T>,
}

// SAFETY: the nodes belong to this value alone.
unsafe impl<T: Send> Send for Taken<T> {}

impl<T> Iterator for Taken<T> {
    type Item = T;

    fn next(&mut self) -> Option<T> {
        if self.next.is_null() {
            return None;
        }
        // SAFETY: `next` is a node that only this value can reach, made by
        // `Box::into_raw`; it is forgotten in the next line.
        let node = unsafe { Box::from_raw(self.next) };
        self.next = node.next;
        Some(node.value)
    }
}

impl<T> Drop for Taken<T> {
    fn drop(&mut self) {
        self.for_each(drop);
    }
}

#[cfg(all(test, not(ploop_loom)))]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn takes_in_the_order_of_the_pushes() {
        let list = LockFreeList::default();
        assert!(list.is_empty());
        (0..5).for_each(|value| list.push(value));
        assert!(!list.is_empty());
        assert_eq!(list.take_all().collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
        assert!(list.take_all().next().is_none());
    }

    #[test]
    fn drops_what_nobody_took() {
        let value = Arc::new(());
        let list = LockFreeList::default();
        list.push(value.clone());
        list.push(value.clone());
        let mut taken = list.take_all();
        list.push(value.clone());
        taken.next();
        drop(taken);
        drop(list);
        assert_eq!(Arc::strong_count(&value), 1);
    }

    #[test]
    fn loses_nothing_between_threads() {
        const EACH: usize = 20_000;
        let list = Arc::new(LockFreeList::default());
        let pushers: Vec<_> = (0..3)
            .map(|pusher| {
                let list = list.clone();
                std::thread::spawn(move || (0..EACH).for_each(|n| list.push((pusher, n))))
            })
            .collect();
        let mut next = [0; 3];
        while next.iter().sum::<usize>() < 3 * EACH {
            for (pusher, n) in list.take_all() {
                assert_eq!(n, next[pusher], "order of pusher {pusher}");
                next[pusher] += 1;
            }
        }
        pushers.into_iter().for_each(|p| p.join().unwrap());
    }
}
