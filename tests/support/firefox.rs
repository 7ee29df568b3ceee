//! A real Firefox, headless, driven by its own WebDriver BiDi (<https://w3c.github.io/webdriver-bidi/>).

use std::path::Path;
use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio::sync::Mutex;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream};

use crate::soon;

/// Maximum time for anything that a page does.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running browser with one open tab.
pub struct Firefox {
    socket: Mutex<WebSocketStream<MaybeTlsStream<TcpStream>>>,
    next: AtomicU64,
    tab: String,
    _child: Child,
    _profile: TempDir,
}

/// Returns true when Firefox is installed. Where it must be (`CI=true`), its absence is a failure.
pub async fn is_installed() -> bool {
    let version = Command::new("firefox-esr").arg("--version").output().await;
    let installed = version.is_ok_and(|output| output.status.success());
    let must = std::env::var_os("CI").is_some_and(|ci| ci == "true");
    assert!(installed || !must, "firefox-esr is not installed: tests/run installs it");
    installed
}

impl Firefox {
    /// Starts Firefox with the push service at `push_service`, a `ws:` URL, instead of Mozilla's.
    pub async fn start(push_service: &str) -> Self {
        let profile = TempDir::new().unwrap();
        let preferences = json!({
            "alerts.useSystemBackend": false,
            "app.normandy.enabled": false,
            "app.update.disabledForTesting": true,
            "browser.shell.checkDefaultBrowser": false,
            "datareporting.policy.dataSubmissionEnabled": false,
            "dom.push.connection.enabled": true,
            "dom.push.enabled": true,
            "dom.push.retryBaseInterval": 100,
            "dom.push.serverURL": push_service,
            "dom.push.testing.allowInsecureServerURL": true,
            "dom.push.testing.ignorePermission": true,
            "network.captive-portal-service.enabled": false,
            "network.connectivity-service.enabled": false,
            "permissions.default.desktop-notification": 1,
            "remote.prefs.recommended": false,
            "toolkit.telemetry.enabled": false,
        });
        let lines = preferences.as_object().unwrap().iter();
        let lines: String = lines.map(|(name, value)| format!("user_pref(\"{name}\", {value});\n")).collect();
        std::fs::write(profile.path().join("user.js"), lines).unwrap();
        let mut child = Command::new("firefox-esr")
            .args(["--headless", "--no-remote", "--remote-debugging-port", "0", "--profile"])
            .arg(profile.path())
            .env("HOME", profile.path())
            .env("MOZ_CRASHREPORTER_DISABLE", "1")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let url = soon("Firefox listens", async {
            loop {
                let line = lines.next_line().await.unwrap().expect("Firefox ended");
                if let Some(url) = line.strip_prefix("WebDriver BiDi listening on ") {
                    return url.trim().to_owned();
                }
            }
        })
        .await;
        let (socket, _) = tokio_tungstenite::connect_async(format!("{url}/session")).await.unwrap();
        let mut firefox = Self {
            socket: Mutex::new(socket),
            next: AtomicU64::new(1),
            tab: String::new(),
            _child: child,
            _profile: profile,
        };
        firefox.call("session.new", json!({ "capabilities": {} })).await;
        let tree = firefox.call("browsingContext.getTree", json!({})).await;
        firefox.tab = tree["contexts"][0]["context"].as_str().unwrap().to_owned();
        firefox
    }

    /// Opens a page and waits until it is loaded.
    pub async fn open(&self, url: &str) {
        let parameters = json!({ "context": self.tab, "url": url, "wait": "complete" });
        self.call("browsingContext.navigate", parameters).await;
    }

    /// Sets the viewport to the width of a phone.
    pub async fn narrow(&self) {
        let viewport = json!({ "width": 390, "height": 844 });
        self.call("browsingContext.setViewport", json!({ "context": self.tab, "viewport": viewport })).await;
    }

    /// Clicks on the element as a mouse does.
    pub async fn click(&self, selector: &str) {
        let locator = json!({ "type": "css", "value": selector });
        let found = self
            .call("browsingContext.locateNodes", json!({ "context": self.tab, "locator": locator }))
            .await;
        let id = found["nodes"][0]["sharedId"].as_str().unwrap_or_else(|| panic!("no {selector}")).to_owned();
        let element = json!({ "type": "element", "element": { "sharedId": id } });
        let actions = json!([{ "type": "pointer", "id": "mouse", "actions": [
            { "type": "pointerMove", "x": 0, "y": 0, "origin": element },
            { "type": "pointerDown", "button": 0 },
            { "type": "pointerUp", "button": 0 },
        ]}]);
        self.call("input.performActions", json!({ "context": self.tab, "actions": actions })).await;
    }

    /// Presses Enter on the element that has the focus.
    pub async fn press_enter(&self) {
        let actions = json!([{ "type": "key", "id": "keyboard", "actions": [
            { "type": "keyDown", "value": "\u{e007}" },
            { "type": "keyUp", "value": "\u{e007}" },
        ]}]);
        self.call("input.performActions", json!({ "context": self.tab, "actions": actions })).await;
    }

    /// Runs a script in the page.
    pub async fn run(&self, script: &str) {
        let target = json!({ "context": self.tab });
        let parameters = json!({ "expression": script, "target": target, "awaitPromise": true });
        self.call("script.evaluate", parameters).await;
    }

    /// Evaluates an expression in the page and returns its value, which must be text. A promise is awaited.
    pub async fn evaluate(&self, expression: &str) -> String {
        let target = json!({ "context": self.tab });
        let parameters = json!({ "expression": expression, "target": target, "awaitPromise": true });
        let answer = self.call("script.evaluate", parameters).await;
        let value = answer["result"]["value"].as_str();
        value.unwrap_or_else(|| panic!("{expression} is no text: {answer}")).to_owned()
    }

    /// Waits until the text of an element fulfils `wanted`, and returns it.
    pub async fn text_of(&self, selector: &str, wanted: impl Fn(&str) -> bool) -> String {
        let began = Instant::now();
        loop {
            let text = self.evaluate(&format!("document.querySelector('{selector}').textContent")).await;
            if wanted(&text) {
                return text;
            }
            assert!(began.elapsed() < PATIENCE, "{selector} says {text:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Saves a screenshot of the page.
    pub async fn screenshot(&self, file: &Path) {
        let answer = self.call("browsingContext.captureScreenshot", json!({ "context": self.tab })).await;
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(file, STANDARD.decode(answer["data"].as_str().unwrap()).unwrap()).unwrap();
    }

    async fn call(&self, method: &str, parameters: Value) -> Value {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let message = json!({ "id": id, "method": method, "params": parameters }).to_string();
        let mut socket = self.socket.lock().await;
        let answer = tokio::time::timeout(PATIENCE, async {
            socket.send(Message::text(message)).await.unwrap();
            loop {
                let message = socket.next().await.expect("Firefox ended").unwrap();
                let Ok(text) = message.to_text() else { continue };
                let answer: Value = serde_json::from_str(text).unwrap_or_default();
                if answer["id"] == id {
                    return answer;
                }
            }
        });
        let answer = answer.await.unwrap_or_else(|_| panic!("{method}: no answer"));
        assert_eq!(answer["type"], "success", "{method}: {answer}");
        answer["result"].clone()
    }
}
