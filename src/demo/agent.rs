//! The agent in a pod: pings and transfers on request.
