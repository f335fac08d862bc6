//! `muslin top`: pods, peers, flows and lost packets as they are at this moment.

mod draw;
mod meter;
mod model;
mod screen;
mod table;
#[cfg(test)]
mod tests;

use std::io::{IsTerminal, stdout};
use std::path::Path;
use std::time::{Duration, Instant};

use clap::Args;
use draw::{Theme, draw};
use model::{Model, News, Tables};
use muslin_stack::api::control::{Peer, Status, Table};
use ratatui::crossterm::event::Event;
use screen::{Screen, events};
use tokio::sync::mpsc::{Receiver, Sender, channel};
use tokio::time::{sleep, timeout};

use super::{NodeChoice, watch};
use crate::control::Client;
use crate::error::{Error, Result};
use crate::process::block_on;
use crate::signals::Signals;
use crate::terminal::style::has_colours;

/// How long a node may take to answer before that is said.
const PATIENCE: Duration = Duration::from_secs(5);
/// Looks that may wait to be drawn.
const WAITING: usize = 4;

#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    node: NodeChoice,
    /// Time between two looks in seconds
    #[arg(short = 'd', long, value_name = "SECONDS", default_value = "1", value_parser = watch::seconds)]
    delay: Duration,
}

/// What was told, and when since the start.
type Told = (Duration, News);

pub(super) fn run(arguments: &Arguments) -> Result<()> {
    if !stdout().is_terminal() {
        return Err(Error::usage(
            "'muslin top' draws on a terminal, and stdout is none: 'muslin pods --watch --json' and its \
             like print one line for each look",
        ));
    }
    let socket = arguments.node.socket()?;
    block_on(async {
        let mut signals = Signals::listen()?;
        let began = Instant::now();
        // What is wrong at first is said without a screen.
        let tables = tokio::select! {
            tables = look(&socket) => tables?,
            _ = signals.next() => return Ok(()),
        };
        let model = Model::new(began.elapsed(), tables);
        let (sender, news) = channel(WAITING);
        let peers_sender = sender.clone();
        let every = arguments.delay;
        // The screen is restored when this ends, whichever part of it does.
        let screen = Screen::open()?;
        tokio::select! {
            ended = show(screen, model, news, signals) => ended,
            () = async {
                sleep(every).await;
                let look = async || look(&socket).await.map(|tables| News::Tables(Box::new(tables)));
                tell(every, began, sender, look).await;
            } => Ok(()),
            // Those that are silent are waited for, which must not hold up the others.
            () = tell(every, began, peers_sender, async || peers(&socket).await.map(News::Peers)) => Ok(()),
        }
    })
}

/// Shows what is told until a key or a signal ends it.
async fn show(
    mut screen: Screen,
    mut model: Model,
    mut news: Receiver<Told>,
    mut signals: Signals,
) -> Result<()> {
    let mut events = events();
    let theme = Theme {
        has_colours: has_colours(&stdout()),
    };
    loop {
        screen.draw(|frame| draw(frame, &model, theme))?;
        tokio::select! {
            told = news.recv() => match told {
                Some((at, news)) => model.learn(at, news),
                None => return Ok(()),
            },
            event = events.recv() => match event {
                Some(Event::Key(key)) if !model.press(key) => return Ok(()),
                // Whatever it is, such as another size, it is drawn anew.
                Some(_) => {}
                // Nobody types there any more.
                None => return Ok(()),
            },
            _ = signals.next() => return Ok(()),
        }
    }
}

/// Looks again and again, and tells what was seen.
async fn tell(
    every: Duration,
    began: Instant,
    to: Sender<Told>,
    look: impl AsyncFn() -> Result<News>,
) {
    loop {
        let looked = Instant::now();
        let news = match timeout(PATIENCE, look()).await {
            Ok(Ok(news)) => news,
            Ok(Err(error)) => News::Trouble(error.to_string()),
            Err(_) => News::Trouble(format!(
                "the node has not answered within {} s",
                PATIENCE.as_secs()
            )),
        };
        if to.send((began.elapsed(), news)).await.is_err() {
            return;
        }
        sleep(every.saturating_sub(looked.elapsed())).await;
    }
}

async fn look(socket: &Path) -> Result<Tables> {
    let client = Client::connect(socket).await?;
    let mut status = client.report::<Status>(Table::Status).await?;
    let status = status.pop();
    Ok(Tables {
        status: status.ok_or_else(|| Error::failed("the node sent no status"))?,
        pods: client.report(Table::Pods).await?,
        flows: client.report(Table::Flows).await?,
        drops: client.report(Table::Drops).await?,
    })
}

async fn peers(socket: &Path) -> Result<Vec<Peer>> {
    Client::connect(socket).await?.report(Table::Peers).await
}
